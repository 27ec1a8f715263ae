"""What layers that another library has quantised have in common, whichever it is.

An adapter computes with the numbers that the weight stands for, in training and in evaluation alike, so that a merge is the live model. What the
library's own kernel does beyond that (LLM.int8's rounding of the inputs in evaluation) happens where no adapter is active.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.stores.dense import Store
from lorakit.stores.saved import made


def comes_from(cls: type, library: str, *names: str) -> bool:
    """Whether a class, or one above it, is of a library, without importing it; by one of these names if there are any."""
    return any(c.__module__.partition(".")[0] == library and (not names or c.__name__ in names) for c in cls.__mro__)


class Guest(Store):
    """A linear layer of another library: its weight is made anew where it is read."""

    packs = True
    plain = nn.Linear
    kept: tuple[str, ...] = ("weight",)  # the layer's attributes that hold the weight

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix (o, i), made anew."""

    def read(self, dtype=None):
        dtype = dtype or self.dtype

        def make() -> Tensor:
            with torch.no_grad():
                return self.dense(dtype).contiguous()

        return made(make)

    @property
    def token(self):
        return self.module.weight

    @property
    def device(self):
        return self.token.device

    def take(self):
        return {k: getattr(self.module, k) for k in self.kept}

    def put(self, kept):
        for k, v in kept.items():
            setattr(self.module, k, v)

    def tensors(self, kept):
        return {k: v for k, v in kept.items() if isinstance(v, Tensor)}

    def rounded(self, W):
        kept = self.take()
        try:
            self.write(W)
            return self.read(torch.promote_types(self.dtype, torch.float32))
        finally:
            self.put(kept)

    def linear(self, site, x, bias):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return site.op(x.to(dtype), site.view(self.read(dtype)), None if bias is None else bias.to(dtype))

    def thaw(self, W):
        dtype = self.dtype
        for k in self.kept[1:]:
            setattr(self.module, k, None)
        self.module.weight = nn.Parameter(W.detach().to(dtype).contiguous(), requires_grad=False)


def unwritable(what: str) -> LorakitError:
    """The error for a weight that its library cannot quantise again."""
    return LorakitError(f"{what} cannot be quantised again from here; mend: lorakit.merge, which puts an ordinary weight in its place, or a base that "
                        "lorakit.quantize has packed")
