"""Where the leaves start: one file per start. An init sets tensors in place; the host keeps the function unchanged.

    init(method, p, W, gen) -> None       p: the leaves, float32 on the CPU; W: thunk of the base weight (o, i)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

INITS: dict[str, Init] = {}


@dataclass(frozen=True)
class Init:
    """A named start: which leaves it sets and whether delta is non-zero after it, so that something must absorb it."""

    name: str
    fn: Callable
    title: str
    formula: str
    paper: str = ""
    needs: tuple[str, ...] = ("A", "B")
    nonzero: bool = False
    aliases: tuple[str, ...] = ()

    def __call__(self, method, p, W, gen) -> None:
        self.fn(method, p, W, gen)


def init(name: str, **card) -> Callable:
    """Decorator: registers a start under `name`."""

    def add(fn):
        INITS[name] = Init(name, fn, **card)
        return fn

    return add


from lorakit.inits import gaussian, kaiming, kaiming_b, nonzero, orthogonal, orthogonal_pair, xavier  # noqa: E402, F401
