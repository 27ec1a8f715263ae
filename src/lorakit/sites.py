"""Geometry: a target seen as a canonical (o, i) matrix, or a stack of them. The only place that knows layer types.

A target is a layer that is called with its input, or a parameter that its module's own forward reads. A site answers how a
matrix, or a chain of factors, acts on the input; it knows nothing of methods.
Grouped convolutions: the canonical matrix is (out, in/groups · kernel); the r filters of a first factor serve every group.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.stores import store_for
from lorakit.stores.dense import Dense, held


class Site:
    """nn.Linear, and the base of the others. Shapes: x (..., in), M (o, i), A (r, i), h (..., r)."""

    transposed = False  # the raw weight is stored (in, out)
    lookup = False  # the input is ids, not activations
    drops = True  # dropout on the input means something
    slides = False  # a convolution
    read = False  # its module reads it; nothing calls it
    stack: tuple[int, ...] = ()  # how many matrices lie in one parameter
    bias_name: str | None = "bias"

    def __init__(self, module: nn.Module):
        self.module, self.store = module, store_for(module)
        self._measure()

    def _measure(self) -> None:
        self.out, self.in_ = self.view(self.store.read()).shape[-2:]
        self._row_sq: tuple[object, tuple, Tensor] | None = None

    def common(self, config: Mapping[str, Any]) -> bool:
        """Whether PEFT computes an adapter of this configuration on this layer as we do, so that its format can say it."""
        return True

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
        return held(self.module, self.bias_name) if self.bias_name else None

    def put_bias(self, b: Tensor | None) -> None:
        """Puts another bias object beside the weight. LorakitError where the layer has no place for one."""
        if self.bias_name is None and b is not None:
            raise LorakitError(f"{type(self.module).__name__} has no place for a bias, so one cannot be merged into it")
        if self.bias_name is not None:
            setattr(self.module, self.bias_name, b)

    def row_sq(self, weight: Callable[[], Tensor]) -> Tensor:
        """Squared row norms of the base weight (o,), kept until the weight changes; a compiled graph keeps nothing."""
        if torch.compiler.is_compiling():
            return weight().detach().square().sum(-1)
        W = self.store.read()
        now = (W._version, W.data_ptr(), W.dtype)  # `model.to(...)` swaps the data under the same object
        if self._row_sq is None or self._row_sq[0] is not W or self._row_sq[1] != now:
            self._row_sq = (W, now, weight().detach().square().sum(-1))
        return self._row_sq[2]

    def pack(self, t: Tensor, axes: str) -> Tensor:
        """A leaf in the layout of the ecosystem's files for this geometry; one of the weight's own shape as the layer keeps it."""
        return self.unview(t) if axes == "o i" else t

    def unpack(self, t: Tensor, axes: str) -> Tensor:
        return self.view(t) if axes == "o i" else t

    def __getstate__(self):
        return self.__dict__ | {"_row_sq": None}


class Conv1DSite(Site):
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored (in, out)."""

    transposed = True


class EmbeddingSite(Site):
    """nn.Embedding: the raw (num, dim) table is (i, o); the input is ids, so a first factor is a look-up too."""

    transposed, lookup, drops, bias_name = True, True, False, None

    def __init__(self, module):
        if module.max_norm is not None:
            raise LorakitError(
                f"an embedding with max_norm={module.max_norm} renormalises its rows in place at every look-up, so no adapter "
                "on it can be exact; mend: leave it out of the targets, or load the model with max_norm=None")
        super().__init__(module)

    def common(self, config):
        return not config.get("lora_bias")

    def op(self, x, M, bias=None):
        y = F.embedding(x, M.mT, self.module.padding_idx if M.shape[1] == self.in_ else None)
        return y if bias is None else y + bias

    def down(self, x, A):
        return F.embedding(x, A.mT, self.module.padding_idx)


class ScaledEmbeddingSite(EmbeddingSite):
    """transformers' `…ScaledWordEmbedding` (Gemma, BART): what is looked up is multiplied by `embed_scale`."""

    def common(self, config):
        return super().common(config) and not config.get("use_dora")

    def op(self, x, M, bias=None):
        y = F.embedding(x, M.mT, self.module.padding_idx if M.shape[1] == self.in_ else None)
        y = y * torch.as_tensor(self.module.embed_scale).to(y)
        return y if bias is None else y + bias

    def down(self, x, A):
        h = super().down(x, A)
        return h * torch.as_tensor(self.module.embed_scale).to(h)


class ConvSite(Site):
    """nn.Conv1d, 2d, 3d with any stride, padding, padding_mode, dilation, groups, kernel."""

    slides = True

    def __init__(self, module):
        self.n = len(module.kernel_size)
        self.raw, self.g = tuple(module.weight.shape[1:]), module.groups
        super().__init__(module)

    def common(self, config):  # PEFT's first factor drops dilation and padding_mode, and its grouped factors are another matrix
        m = self.module
        return self.g == 1 and m.padding_mode == "zeros" and set(m.dilation) == {1}

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


class ParameterSite(Site):
    """A parameter or buffer that its module's own forward reads: it is never called, the module runs with the adapted value in its place.

    Raw shapes: a matrix (o, i); a stack (E, o, i), or (E, i, o) where the module says `is_transposed`, as fused experts are kept; a
    vector (o,), which is a column (o, 1). Every matrix of a stack gets leaves of its own.
    """

    drops, read = False, True

    def __init__(self, module: nn.Module, name: str):
        self.module, self.store = module, Dense(module, name)
        W = self.store.read()
        self.raw = tuple(W.shape)
        self.stack = self.raw[:1] if len(self.raw) == 3 else ()
        self.transposed = bool(self.stack) and bool(getattr(module, "is_transposed", False))
        self.bias_name = None
        self._measure()
        beside = [n for n in (name.replace("weight", "bias"), f"{name}_bias") if n != name and len(self.raw) > 1]
        fits = (t for n in beside if isinstance(t := held(module, n), Tensor) and tuple(t.shape) == (*self.stack, self.out))
        self.bias_name = next((n for n in beside if any(held(module, n) is t for t in fits)), None)

    def common(self, config):
        return not (config.get("use_dora") or config.get("lora_bias"))

    def view(self, W):
        return super().view(W) if len(self.raw) in (2, 3) else W.reshape(*self.raw[:1], -1) if len(self.raw) > 3 else W.reshape(-1, 1)

    def unview(self, M):
        return super().unview(M) if len(self.raw) in (2, 3) else M.reshape(self.raw)

    def op(self, x, M, bias=None):
        raise LorakitError(f"{type(self.module).__name__}.{self.store.name} is read by its module, not called")

    down = op

    def pack(self, t, axes):  # as PEFT lays out the factors of a stack: (E r, i) and (o, r E)
        if not self.stack or axes == "o i" or len(axes.split()) != 2:
            return super().pack(t, axes)
        return t.permute(1, 2, 0).flatten(1) if axes.startswith("o ") else t.flatten(0, 1)

    def unpack(self, t, axes):
        if not self.stack or axes == "o i" or len(axes.split()) != 2:
            return super().unpack(t, axes)
        E = self.stack[0]
        return t.unflatten(1, (-1, E)).permute(2, 0, 1) if axes.startswith("o ") else t.unflatten(0, (E, -1))


class OutProjectionSite(ParameterSite):
    """The out-projection of torch's attention. PEFT (0.21.2 and before) adds its update twice, live and merged, so in PEFT's files half a
    factor stands for a whole one; halving and doubling are exact."""

    def pack(self, t, axes):
        return t / 2 if axes == "o r" else super().pack(t, axes)

    def unpack(self, t, axes):
        return t * 2 if axes == "o r" else super().unpack(t, axes)


SITES: dict[str, type[Site]] = {
    "torch.nn.modules.linear.Linear": Site,
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": Site,
    "torch.nn.modules.sparse.Embedding": EmbeddingSite,
    "torch.nn.modules.conv.Conv1d": ConvSite,
    "torch.nn.modules.conv.Conv2d": ConvSite,
    "torch.nn.modules.conv.Conv3d": ConvSite,
    "transformers.pytorch_utils.Conv1D": Conv1DSite,
}
SCALED = re.compile(r"ScaledWordEmbedding$")  # a class of transformers, one for each model, that multiplies by `embed_scale`
FUSES = ("torch.nn.modules.transformer.TransformerEncoderLayer",)  # fast path in evaluation: one kernel over all weights
ATTENTION = "torch.nn.modules.activation.MultiheadAttention"
EXPERTS = re.compile(r"Experts$")  # classes of transformers 5 that keep all experts in one parameter
NO_ROWS = re.compile(r"(^|\.)(experts\.\d+(\.|$)|relative_attention_bias$)")  # what these get are not the rows of the batch


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def _site_class(cls: type) -> type[Site] | None:
    if SCALED.search(cls.__name__) and issubclass(cls, nn.Embedding):
        return ScaledEmbeddingSite
    return next((SITES[n] for n in map(_qualified, cls.__mro__) if n in SITES), None)


def adaptable(module: nn.Module) -> bool:
    """Whether there is a site for this layer's class."""
    return _site_class(type(module)) is not None


def linear_like(module: nn.Module) -> bool:
    """Whether the layer is a plain matrix product: no look-up, no sliding window."""
    site = _site_class(type(module))
    return site is not None and not site.lookup and not site.slides


def plain(module: nn.Module) -> bool:
    """Whether a layer's weight, as it is stored, is the canonical matrix."""
    return _site_class(type(module)) is Site


def reads(module: nn.Module | None) -> dict[str, str]:
    """Target's name inside the module -> parameter, for what a module reads of its own and its children's weights without calling them."""
    if module is None or ATTENTION not in map(_qualified, type(module).__mro__):
        return {}
    packed = ("in_proj_weight",) if module._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return {n: n for n in packed} | {"out_proj": "out_proj.weight"}


def fused(module: nn.Module) -> list[str]:
    """Names of the parameters that hold the matrices of all experts."""
    mine = any(EXPERTS.search(c.__name__) for c in type(module).__mro__)
    return [n for n, p in module._parameters.items() if mine and p is not None and p.dim() == 3]


@dataclass(frozen=True)
class Place:
    """Where a target is: `owner` is the layer that is called, or the module that reads `parameter`, which it knows as `key`."""

    owner: str
    key: str = ""
    parameter: str = ""


def place(modules: Mapping[str, nn.Module], path: str) -> Place | None:
    """The place of a module's or a parameter's path; None where the model has neither."""
    above, _, last = path.rpartition(".")
    parent = modules.get(above)
    if last in (inside := reads(parent)):
        return Place(above, last, inside[last])
    if path in modules:
        return Place(path)
    if parent is not None and (parent._parameters.get(last) is not None or parent._buffers.get(last) is not None):
        return Place(above, last, last)
    return None


def named_as(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> dict[str, str]:
    """Target -> the name that patterns know it by: what an attention reads goes by the attention's."""
    at = {p: place(modules, p) for p in paths}
    return {p: a.owner if a and a.key and reads(modules[a.owner]) else p for p, a in at.items()}


def site_at(modules: Mapping[str, nn.Module], path: str) -> Site:
    """The site of a target. LorakitError where there is none."""
    at = place(modules, path)
    if at is None:
        raise LorakitError(f"the model has no module or parameter `{path}`")
    if not at.key:
        return site_for(modules[at.owner], path)
    inner, _, name = at.parameter.rpartition(".")
    kind = OutProjectionSite if reads(modules[at.owner]) and inner else ParameterSite
    return kind(modules[at.owner].get_submodule(inner), name)


def check_caller(modules: Mapping[str, nn.Module], path: str) -> None:
    """LorakitError where a module around a target reads its weight without calling what is between."""
    above = path
    while above and torch.backends.mha.get_fastpath_enabled():
        above = above.rpartition(".")[0]
        if above in modules and _qualified(type(modules[above])) in FUSES:
            raise LorakitError(f"{path}: {type(modules[above]).__name__} reads this layer's weight without calling it when it evaluates, so an adapter "
                               "would be skipped silently; mend: torch.backends.mha.set_fastpath_enabled(False) first")


def site_for(module: nn.Module, path: str = "") -> Site:
    """The site of a layer. LorakitError for an unknown layer, or one whose class computes something of its own."""
    cls = getattr(type(module), "own_class", type(module))  # what an adapted layer was
    if _site_class(cls) is ScaledEmbeddingSite:
        return ScaledEmbeddingSite(module)
    for base in cls.__mro__:
        name = _qualified(base)
        if name in SITES:
            if cls.forward is not base.forward:
                raise LorakitError(f"{path or cls.__name__}: {_qualified(cls)} has a forward of its own, not {base.__name__}'s; an adapter would "
                                   f"compute something else. Mend: name its parameter instead, target_parameters: [{path.rpartition('.')[2]}.weight], or "
                                   "register a Site for it in lorakit.sites.SITES")
            return SITES[name](module)
    known = ", ".join(n.rsplit(".", 1)[1] for n in SITES)
    raise LorakitError(f"{path or 'this module'} is a {cls.__name__}; adapters can be put on {known}, and on any parameter by name (target_parameters)")


# Mixed batches through a module that reads its weights: which dimension of its inputs and outputs holds the batch


@dataclass
class Batch:
    """The inputs of one call: for each tensor its batch dimension and how many entries in a row belong to one element of the batch."""

    n: int
    args: tuple
    kwargs: dict[str, Any]
    dims: dict[int | str, tuple[int, int]]
    out: tuple[int, ...] = (0,)

    def take(self, rows: Tensor) -> tuple[tuple, dict[str, Any]]:
        def cut(key, t):
            if key not in self.dims:
                return t
            dim, each = self.dims[key]
            at = rows if each == 1 else (rows[:, None] * each + torch.arange(each)).reshape(-1)
            return t.index_select(dim, at.to(t.device))

        return tuple(cut(k, t) for k, t in enumerate(self.args)), {k: cut(k, t) for k, t in self.kwargs.items()}

    def join(self, parts: list[Any], rows: list[Tensor]) -> Any:
        order = torch.cat(rows).argsort()

        def glue(parts, dim):
            return torch.cat(parts, dim).index_select(dim, order.to(parts[0].device)) if isinstance(parts[0], Tensor) else parts[0]

        if not isinstance(parts[0], tuple):
            return glue(parts, self.out[0])
        return tuple(glue(p, self.out[min(k, len(self.out) - 1)]) for k, p in enumerate(zip(*parts, strict=True)))


def batch_of(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Batch:
    """How a call is cut into rows: along the first dimension, for every tensor as long as the first; attention says its own."""
    if ATTENTION in map(_qualified, type(module).__mro__):
        given = dict(inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs).arguments)
        given.pop("self")
        b, mask = 0 if module.batch_first else 1, given.get("attn_mask")
        if given["query"].dim() != 3:
            raise LorakitError("a mixed batch needs batched inputs, (batch, length, width), for MultiheadAttention")
        dims = {"query": (b, 1), "key": (b, 1), "value": (b, 1)}
        dims |= {"key_padding_mask": (0, 1)} if given.get("key_padding_mask") is not None else {}
        dims |= {"attn_mask": (0, module.num_heads)} if mask is not None and mask.dim() == 3 else {}
        return Batch(given["query"].shape[b], (), given, dims, (b, 0))
    tensors = {k: t for k, t in [*enumerate(args), *kwargs.items()] if isinstance(t, Tensor) and t.dim()}
    n = len(next(iter(tensors.values())))
    return Batch(n, args, dict(kwargs), {k: (0, 1) for k, t in tensors.items() if len(t) == n})
