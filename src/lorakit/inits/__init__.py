"""Where the leaves start: one file per start. An init sets tensors in place; the host keeps the function unchanged.

    init(method, p, W, gen) -> None       p: the leaves, float32 on the CPU; W: thunk of the base weight (o, i)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorakit.method import zeros

INITS: dict[str, Init] = {}


@dataclass(frozen=True)
class Init:
    """A named start: which leaves it sets and whether delta is non-zero after it, so that something must absorb it."""

    name: str
    fn: Callable
    title: str
    formula: str
    paper: str = ""
    nonzero: bool = False
    aliases: tuple[str, ...] = ()

    def __call__(self, method, p, W, gen) -> None:
        self.fn(method, p, W, gen)

    def unfit(self, method) -> str | None:
        """Why this start means nothing for a method; None for those made of private factors A (r, i) and B (o, r), of which B starts at zero."""
        for k, axes in (("A", "r i"), ("B", "o r")):
            leaf = method.core.own.get(k)
            if leaf is None or leaf.axes != axes:
                return f"init {self.name} sets the leaf {k} ({axes}), which {method.core.name} does not have"
            if method.core.leaves[k].shared:
                return f"init {self.name} sets the leaf {k}, which {method.core.name} shares among targets"
            if not leaf.trains:
                return f"init {self.name} sets the leaf {k}, which {method.core.name} has from elsewhere"
        return None if method.core.leaves["B"].start is zeros else f"init {self.name} sets B to zero, from where {method.core.name} could not move"


def init(name: str, **card) -> Callable:
    """Decorator: registers a start under `name`."""

    def add(fn):
        INITS[name] = Init(name, fn, **card)
        return fn

    return add


from lorakit.inits import gaussian, kaiming, kaiming_b, nonzero, orthogonal, orthogonal_pair, xavier  # noqa: E402, F401
