"""Layers that are called with their input, each as a canonical (o, i) matrix.

Grouped convolutions: the canonical matrix is (out, in/groups · kernel); the r filters of a first factor serve every group.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.stores import store_for
from lorakit.stores.dense import held
from lorakit.stores.saved import made


class Site:
    """nn.Linear, and the base of the others. Shapes: x (..., in), M (o, i), A (r, i), h (..., r)."""

    transposed = False  # the raw weight is stored (in, out)
    lookup = False  # the input is ids, not activations
    drops = True  # dropout on the input means something
    slides = False  # a convolution
    channel = -1  # the dimension of inputs and outputs that holds the channels
    read = False  # its module reads it; nothing calls it
    stack: tuple[int, ...] = ()  # how many matrices lie in one parameter
    whole = ""  # no layer but a module that a method goes around: "model", "attention"
    bias_name: str | None = "bias"

    def __init__(self, module: nn.Module):
        self.module, self.store = module, store_for(module)
        self._measure()

    def _measure(self) -> None:
        self.out, self.in_ = self.view(torch.empty(self.store.shape, device="meta")).shape[-2:]
        self._row_sq: tuple[object, tuple, Tensor] | None = None

    def common(self, config: Mapping[str, Any]) -> bool:
        """Whether PEFT computes an adapter of this configuration on this layer as we do, so that its format can say it."""
        return True

    @property
    def dtype(self) -> torch.dtype:
        return self.store.dtype

    def view(self, W: Tensor) -> Tensor:  # raw -> (o, i)
        return W.mT if self.transposed else W

    def unview(self, M: Tensor) -> Tensor:  # (o, i) -> raw
        return M.mT if self.transposed else M

    def rounded(self, M: Tensor) -> Tensor:
        """A matrix (o, i) as the store would keep it."""
        return self.view(self.store.rounded(self.unview(M)))

    def anew(self, make: Callable[[], Tensor]) -> Tensor:
        """make(), a matrix without gradients that is made again for the backward pass and not kept for it where the weight is not kept either."""
        return made(make)

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

    def chain(self, x: Tensor, *factors: Tensor | float, drop: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Act with F1 F2 … Fn on drop(x) without forming the product; a 1-D factor is a diagonal, a number a scale, the last is (r, i)."""
        *rest, A = factors
        times = None if self.slides or self.lookup else getattr(drop, "times", None)
        h = times(x, A) if times else self.down(x if drop is None else drop(x), A)
        first = next((k for k, M in enumerate(rest) if isinstance(M, Tensor) and M.dim() == 2), -1)  # from here to the left: output channels
        for k in reversed(range(len(rest))):
            M = rest[k]
            h = h * M if not isinstance(M, Tensor) else (self.scale if M.dim() == 1 else self.mix)(h, M, k <= first)
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
        token = self.store.token
        now = (token._version, token.data_ptr(), token.dtype)  # `model.to(...)` swaps the data under the same object
        if self._row_sq is None or self._row_sq[0]() is not token or self._row_sq[1] != now:
            self._row_sq = (weakref.ref(token), now, weight().detach().square().sum(-1))
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
        self.channel = -1 - self.n
        self.g = module.groups
        super().__init__(module)
        self.raw = self.store.shape[1:]

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
        if len(names) == 2 and names[-1] == "r":
            return t.reshape(*t.shape, *[1] * self.n)
        return t.reshape(1, -1, *[1] * self.n) if names == ["o"] else t

    def unpack(self, t, axes):
        if axes == "o":
            return t.reshape(-1)
        names = axes.split()
        return t.flatten(len(names) - 1) if names[-1] in ("i", "r") else t
