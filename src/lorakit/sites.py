"""Geometry: a target layer seen as a canonical (o, i) matrix. The only place that knows layer types.

A site answers how a matrix, or a chain of factors, acts on this layer's input; it knows nothing of methods.
Grouped convolutions: the canonical matrix is (out, in/groups · kernel); the r filters of a first factor serve every group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.stores import store_for
from lorakit.stores.dense import held


class Site:
    """nn.Linear, and the base of the others. Shapes: x (..., in), M (o, i), A (r, i), h (..., r)."""

    transposed = False  # the raw weight is stored (in, out)
    lookup = False  # the input is ids, not activations
    drops = True  # dropout on the input means something
    slides = False  # a convolution
    common = True  # PEFT computes an adapter on this layer as we do, so its format can say it

    def __init__(self, module: nn.Module):
        self.module, self.store = module, store_for(module)
        self.out, self.in_ = self.view(self.store.read()).shape
        self._row_sq: tuple[object, tuple, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.store.read().dtype

    def view(self, W: Tensor) -> Tensor:  # raw -> (o, i)
        return W.mT if self.transposed else W

    def unview(self, M: Tensor) -> Tensor:  # (o, i) -> raw
        return M.mT if self.transposed else M

    def op(self, x: Tensor, M: Tensor, bias: Tensor | None = None) -> Tensor:
        """Act with a dense matrix M (o, i)."""
        return F.linear(x, M, bias)

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Act with the first factor A (r, i)."""
        return F.linear(x, A)

    def mix(self, h: Tensor, M: Tensor, last: bool) -> Tensor:
        """Act with a factor on the channels of h; `last` gives the layer's outputs."""
        return F.linear(h, M)

    def scale(self, h: Tensor, v: Tensor, last: bool) -> Tensor:
        """Multiply the channels of h by v."""
        return h * v

    def chain(self, x: Tensor, *factors: Tensor) -> Tensor:
        """Act with F1 F2 … Fn without forming the product; a 1-D factor is a diagonal, the last is (r, i)."""
        *rest, A = factors
        h = self.down(x, A)
        first = next((k for k, M in enumerate(rest) if M.dim() == 2), -1)  # from here to the left: output channels
        for k in reversed(range(len(rest))):
            h = (self.scale if rest[k].dim() == 1 else self.mix)(h, rest[k], k <= first)
        return h

    def add_bias(self, y: Tensor, b: Tensor | None) -> Tensor:
        return y if b is None else y + b.to(y.dtype)

    @property
    def bias(self) -> Tensor | None:
        return held(self.module, "bias")

    def row_sq(self, weight: Callable[[], Tensor]) -> Tensor:
        """Squared row norms of the base weight (o,), kept until the weight changes; a compiled graph keeps nothing."""
        if torch.compiler.is_compiling():
            return weight().detach().square().sum(1)
        W = self.store.read()
        now = (W._version, W.data_ptr(), W.dtype)  # `model.to(...)` swaps the data under the same object
        if self._row_sq is None or self._row_sq[0] is not W or self._row_sq[1] != now:
            self._row_sq = (W, now, weight().detach().square().sum(1))
        return self._row_sq[2]

    def pack(self, t: Tensor, axes: str) -> Tensor:
        """A leaf in the layout of the ecosystem's files for this geometry."""
        return t

    def unpack(self, t: Tensor, axes: str) -> Tensor:
        return t

    def __getstate__(self):
        return self.__dict__ | {"_row_sq": None}


class Conv1DSite(Site):
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored (in, out)."""

    transposed = True


class EmbeddingSite(Site):
    """nn.Embedding: the raw (num, dim) table is (i, o); the input is ids, so a first factor is a look-up too."""

    transposed, lookup, drops = True, True, False

    def __init__(self, module):
        if module.max_norm is not None:
            raise LorakitError(
                f"an embedding with max_norm={module.max_norm} renormalises its rows in place at every look-up, so no adapter "
                "on it can be exact; mend: leave it out of the targets, or load the model with max_norm=None")
        super().__init__(module)

    def op(self, x, M, bias=None):
        return F.embedding(x, M.mT, self.module.padding_idx)

    def down(self, x, A):
        return F.embedding(x, A.mT, self.module.padding_idx)


class ConvSite(Site):
    """nn.Conv1d, 2d, 3d with any stride, padding, padding_mode, dilation, groups, kernel."""

    slides = True

    def __init__(self, module):
        self.n = len(module.kernel_size)
        self.raw, self.g = tuple(module.weight.shape[1:]), module.groups
        # PEFT's first factor drops dilation and padding_mode, and its grouped factors are another matrix
        self.common = self.g == 1 and module.padding_mode == "zeros" and set(module.dilation) == {1}
        super().__init__(module)

    def _conv(self, x, M, bias, groups):
        m = self.module
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.n - 1]
        padding = m.padding
        if m.padding_mode != "zeros":
            x, padding = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode), 0
        return conv(x, M, bias, m.stride, padding, m.dilation, groups)

    def view(self, W):
        return W.flatten(1)

    def unview(self, M):
        return M.reshape(-1, *self.raw)

    def op(self, x, M, bias=None):
        return self._conv(x, self.unview(M), bias, self.g)

    def down(self, x, A):  # every group of the input gets its own copy of the r filters
        A = self.unview(A)
        return self._conv(x, A if self.g == 1 else A.repeat(self.g, *[1] * (self.n + 1)), None, self.g)

    def mix(self, h, M, last):
        M = M if last or self.g == 1 else M.repeat(self.g, 1)
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.n - 1]
        return conv(h, M.reshape(*M.shape, *[1] * self.n), groups=self.g)

    def scale(self, h, v, last):
        v = v if last or self.g == 1 else v.repeat(self.g)
        return h * v.view(-1, *[1] * self.n)

    def add_bias(self, y, b):
        return y if b is None else y + b.to(y.dtype).view(-1, *[1] * self.n)

    def pack(self, t, axes):
        names = axes.split()
        if names[-1] == "i":
            return t.reshape(*t.shape[:-1], *self.raw)
        if len(names) == 2:
            return t.reshape(*t.shape, *[1] * self.n)
        return t.reshape(1, -1, *[1] * self.n) if names == ["o"] else t

    def unpack(self, t, axes):
        if axes == "o":
            return t.reshape(-1)
        return t.flatten(len(axes.split()) - 1) if axes.endswith(("i", "r")) else t


SITES: dict[str, type[Site]] = {
    "torch.nn.modules.linear.Linear": Site,
    "torch.nn.modules.sparse.Embedding": EmbeddingSite,
    "torch.nn.modules.conv.Conv1d": ConvSite,
    "torch.nn.modules.conv.Conv2d": ConvSite,
    "torch.nn.modules.conv.Conv3d": ConvSite,
    "transformers.pytorch_utils.Conv1D": Conv1DSite,
}
REFUSED = {
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear":
        "nn.MultiheadAttention reads this layer's weight without calling it, so an adapter on it would be skipped silently",
}
FUSES = ("torch.nn.modules.transformer.TransformerEncoderLayer",)  # fast path in evaluation: one kernel over all weights


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def _site_class(cls: type) -> type[Site] | None:
    names = [_qualified(c) for c in cls.__mro__]
    return None if any(n in REFUSED for n in names) else next((SITES[n] for n in names if n in SITES), None)


def adaptable(module: nn.Module) -> bool:
    """Whether there is a site for this layer's class."""
    return _site_class(type(module)) is not None


def linear_like(module: nn.Module) -> bool:
    """Whether the layer is a plain matrix product: no look-up, no sliding window."""
    site = _site_class(type(module))
    return site is not None and not site.lookup and not site.slides


def refusal(module: nn.Module) -> str | None:
    """Why no adapter can be put on a layer that looks like one that could carry it."""
    return next((REFUSED[n] for c in type(module).__mro__ if (n := _qualified(c)) in REFUSED), None)


def check_caller(parent: nn.Module | None, path: str) -> None:
    """LorakitError where the module around a layer reads its weight without calling it."""
    if parent is not None and _qualified(type(parent)) in FUSES and torch.backends.mha.get_fastpath_enabled():
        raise LorakitError(f"{path}: {type(parent).__name__} reads this layer's weight without calling it when it evaluates, so an adapter would "
                           "be skipped silently; mend: torch.backends.mha.set_fastpath_enabled(False) first")


def site_for(module: nn.Module, path: str = "") -> Site:
    """The site of a layer. LorakitError for an unknown layer, or one whose class computes something of its own."""
    cls = type(module)
    if why := refusal(module):
        raise LorakitError(f"{path or cls.__name__}: {why}")
    for base in cls.__mro__:
        name = _qualified(base)
        if name in SITES:
            if cls.forward is not base.forward:
                raise LorakitError(f"{path or cls.__name__}: {_qualified(cls)} has a forward of its own, not {base.__name__}'s; an adapter "
                                   "would compute something else. Mend: register a Site for it in lorakit.sites.SITES")
            return SITES[name](module)
    known = ", ".join(n.rsplit(".", 1)[1] for n in SITES)
    raise LorakitError(f"{path or 'this module'} is a {cls.__name__}; adapters can be put on {known}")
