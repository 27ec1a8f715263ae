"""A linear map seen two ways: as an action on activations and as a matrix. Everything else is a function between them.

Symbols used in the whole code base: o outputs, i inputs, r rank, b batch; W (o, i), A (r, i), B (o, r).
A map leaves out the bias unless its base was given one; `weight()` is at least float32. Where a parameter holds a stack of
matrices, weights and leaves have its dimension in front.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.kernels.segments import Layout, segmented

if TYPE_CHECKING:
    from lorakit.method import Method
    from lorakit.sites import Site


class Map(ABC):
    """One linear map, two views that must agree: `op(x, m.weight()) == m(x)`."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def weight(self) -> Tensor:  # (o, i), at least float32
        ...

    def row_sq(self) -> Tensor:  # (o,): the squared norm of every row
        return self.weight().square().sum(-1)

    def product(self) -> tuple[Tensor, Tensor | None] | None:
        """The weight (o, i) as it is kept, and the bias, where the map is no more than x Wᵀ + b with them."""
        return None


@dataclass(frozen=True)
class Base(Map):
    """The frozen layer itself. With `bias` its kernel adds it, which is free; without, the caller does."""

    site: Site
    bias: Tensor | None = None

    def __call__(self, x):
        return self.site.store.linear(self.site, x, self.bias)

    def weight(self):
        store = self.site.store
        return self.site.view(store.read(torch.promote_types(store.dtype, torch.float32) if store.dtype.is_floating_point else None))

    def row_sq(self):
        return self.site.row_sq(self.weight)

    def product(self):
        site = self.site
        W = None if site.slides or site.lookup or site.stack or site.read else site.store.operand
        return None if W is None else (site.view(W), self.bias)


@dataclass
class Once(Map):
    """Runs the inner map once per input, however many adapters ask for it."""

    inner: Map
    x: Tensor | None = None
    y: Tensor | None = None

    def __call__(self, x):
        if x is not self.x:
            self.x, self.y = x, self.inner(x)
        return self.y

    def weight(self):
        return self.inner.weight()

    def row_sq(self):
        return self.inner.row_sq()


def same(x: Tensor) -> Tensor:
    return x


def each(site: Site, method: Method, what: Callable, p: dict[str, Tensor], *more: Tensor):
    """what(p, *more), for every matrix of a stack where the site holds one; a leaf that the whole model shares is not stacked."""
    if not site.stack:
        return what(p, *more)
    dims = {k: None if method.leaves[k].shared else 0 for k in p}
    return torch.vmap(what, (dims, *(0 for _ in more)))(p, *more)


@dataclass(frozen=True)
class Applied(Map):
    """One method with its parameters around an inner map; `gain` g gives inner + g (applied - inner)."""

    method: Method
    p: dict[str, Tensor]
    inner: Map
    site: Site
    drop: Callable[[Tensor], Tensor] = same
    gain: float = 1.0

    def __call__(self, x):
        if self.gain == 1.0:
            return self.method.act(self.p, x, self.inner, self.site, self.drop)
        return self.inner(x) + self.update(x)

    def update(self, x: Tensor) -> Tensor:
        """What this adapter adds to the inner map's output."""
        u = self.method.update(self.p, x, self.inner, self.site, self.drop)
        return u if self.gain == 1.0 else u * self.gain

    def weight(self):
        W = self.inner.weight()
        V = each(self.site, self.method, partial(self.method.weight_at, site=self.site), self.p, W)
        return V if self.gain == 1.0 else W + (V - W) * self.gain


# Live combinations: several maps over one base are a map again.


@dataclass(frozen=True)
class Sum(Map):
    """base + sum of what each adapter adds to it."""

    base: Map
    maps: Sequence[Applied]

    def __call__(self, x):
        y = self.base(x)
        for m in self.maps:
            y = y + m.update(x)
        return y

    def weight(self):
        W = self.base.weight()
        return W + sum(m.weight() - W for m in self.maps)


@dataclass(frozen=True)
class After:
    """Serial adapters behind a layer: y + sum of what each adds to it; chained, each gets what the one before it made."""

    call: Callable[[Tensor], Tensor]
    maps: Sequence[Applied]
    chained: bool = False

    def __call__(self, x):
        y = begun = self.call(x)
        for m in self.maps:
            y = y + m.method.after(m.p, y if self.chained else begun, m.site, m.drop) * m.gain
        return y


@dataclass(frozen=True)
class Affine:
    """A map and the bias that is added after it; not a linear map any more, so it is only called."""

    map: Map
    site: Site
    bias: Tensor | None

    def __call__(self, x):
        return self.site.add_bias(self.map(x), self.bias)


def spread(index: Tensor, n: int, where: str = "a layer") -> Tensor:
    """The adapter of each of n entries along a batch dimension: one row may stand for several in a row (tokens folded into it, beams)."""
    if n % len(index):
        raise LorakitError(f"a mixed batch of {len(index)} rows reached {where} as an input whose first dimension is {n}, which is no multiple of it")
    return index.repeat_interleave(n // len(index))


def groups(index: Tensor) -> list[tuple[int, Tensor]]:
    """(adapter or -1, the rows it has), in order."""
    return [(i, (index == i).nonzero().squeeze(1)) for i in index.unique().tolist()]


@dataclass(frozen=True)
class PerRow:
    """Mixed batch: row b of the batch goes through calls[index[b]]; -1 means the base. An input of one row is every row's."""

    base: Callable[[Tensor], Tensor]
    calls: Sequence[Callable[[Tensor], Tensor]]
    index: Tensor  # (b,), on the CPU
    where: str = "a layer"

    def __call__(self, x):
        x = x.expand(len(self.index), *x.shape[1:]) if len(x) == 1 else x
        y = None
        for i, rows in groups(spread(self.index, len(x), self.where)):
            rows = rows.to(x.device)
            part = (self.base if i < 0 else self.calls[i])(x[rows])
            y = part.new_zeros(len(x), *part.shape[1:]) if y is None else y
            y = y.index_copy(0, rows, part)
        return y


@dataclass(frozen=True)
class Grouped:
    """Mixed batch of adapters that each add a thin product to one base: the base runs once for all rows, the products by groups of rows."""

    base: Callable[[Tensor], Tensor]
    layout: Callable[[int, torch.device], Layout]  # of a batch of so many entries
    factors: Callable[[Layout, torch.dtype], tuple[Tensor, Tensor]]
    drop: Callable[[Tensor], Tensor]
    rows: int

    def __call__(self, x):
        x = x.expand(self.rows, *x.shape[1:]) if len(x) == 1 else x
        y, at = self.base(x), self.layout(len(x), x.device)
        return y + segmented(self.drop(x), at, *self.factors(at, x.dtype)).to(y.dtype) if at.kinds else y


@dataclass(frozen=True)
class Routed:
    """Mixture of adapters: gate(x) gives one weight per token and adapter, (..., n)."""

    base: Map
    maps: Sequence[Applied]
    gate: Callable[[Tensor], Tensor]

    def __call__(self, x):
        y, g = self.base(x), self.gate(x)
        return y + sum(g[..., n, None] * m.update(x) for n, m in enumerate(self.maps))
