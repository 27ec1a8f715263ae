"""Where the leaves start: one file per start. An init sets tensors in place; the host keeps the function unchanged.

    init(method, p, W, gen, *, found, …) -> None    p: the leaves, float32 on the CPU; W: thunk of the base weight (o, i)

On a quantised base W gives the weight from before, where that is known, and W.rounded(M) a matrix as such a base would keep it; a start that is
`joint` with the quantisation returns the matrix that the base is to keep.

Keyword arguments with a default are the start's options; `found` is what `collect` gathered from data for this target.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from lorakit.errors import LorakitError, near
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
    joint: bool = False  # made together with how the base is quantised, which then keeps another matrix
    mends: bool = False  # is there to change the function: it gives back what quantising lost
    aliases: tuple[str, ...] = ()
    collect: Callable | None = None  # (model, {path: (method, site)}, data, options) -> {path: what it found}, for starts that need data
    allot: Callable | None = None  # ({path: method}, found, options) -> {path: method, or None to leave the target alone}

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        every = inspect.signature(self.fn, eval_str=True).parameters
        return {k: v for k, v in every.items() if v.kind is v.KEYWORD_ONLY and k != "found"}

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every option, given or at its default. LorakitError for one that does not exist or a value that means nothing."""
        for k, v in given.items():
            if k == "batches" and self.collect:
                if isinstance(v, bool) or not isinstance(v, int) or v < 1:
                    raise LorakitError(f"init {self.name}: batches must be a whole number of at least 1, not {v!r}")
                continue
            if k not in self.options:
                raise LorakitError(f"init has no option `{k}`{near(k, ('name', 'storage', 'batches', *self.options))}")
            kind = self.options[k].annotation
            if words := get_args(kind):
                if v not in words:
                    raise LorakitError(f"init {self.name}: unknown {k} `{v}`{near(str(v), words)}")
            elif kind is bool and not isinstance(v, bool):
                raise LorakitError(f"init {self.name}: {k} must be true or false, not {v!r}")
            elif kind is int and (isinstance(v, bool) or not isinstance(v, int) or v < 0):
                raise LorakitError(f"init {self.name}: {k} must be a whole number of at least 0, not {v!r}")
            elif kind is float and (isinstance(v, bool) or not isinstance(v, int | float) or not v > 0):
                raise LorakitError(f"init {self.name}: {k} must be a number above 0, not {v!r}")
        return {k: given.get(k, o.default) for k, o in self.options.items()}

    def __call__(self, method, p, W, gen, found=None, **options) -> Tensor | None:
        return self.fn(method, p, W, gen, **({"found": found} if self.collect else {}), **options)

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


from lorakit.inits import (  # noqa: E402
    corda,  # noqa: F401
    eva,  # noqa: F401
    gaussian,  # noqa: F401
    kaiming,  # noqa: F401
    kaiming_b,  # noqa: F401
    l2qer,  # noqa: F401
    loftq,  # noqa: F401
    lora_ga,  # noqa: F401
    lq_lora,  # noqa: F401
    lqer,  # noqa: F401
    milora,  # noqa: F401
    nonzero,  # noqa: F401
    olora,  # noqa: F401
    orthogonal,  # noqa: F401
    orthogonal_pair,  # noqa: F401
    pissa,  # noqa: F401
    xavier,  # noqa: F401
)
