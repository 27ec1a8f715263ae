"""A layer whose weight is kept by a scheme (NF4, int8, …): buffers in place of the parameter, the same layer otherwise.

The layer gets a class made from its own (`class PackedLinear(PackedLayer, Linear)`); `layer.weight` still reads as the matrix, made anew each
time.
"""

from __future__ import annotations

import copyreg
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.stores.saved import leanly
from lorakit.stores.scheme import Scheme

PREFIX = "weight_"  # of the parts' names among the layer's buffers


class _Made(type):
    """The class of classes made here, so that pickle can name them."""


class PackedLayer(nn.Module):
    """Mixed into a layer's class; `quantize` puts in `scheme`, `site`, `shape`, `raw`, `turned`, `compute` and the buffers."""

    own_class: type  # what it was
    scheme: Scheme
    site: Any  # the layer's geometry
    shape: tuple[int, int]  # of the matrix that was quantised
    raw: tuple[int, ...]  # of the weight as the layer keeps it
    turned: bool  # the matrix is the transposed weight
    compute: torch.dtype  # what the numbers are made as

    def forward(self, x):
        site = self.site
        call = leanly(site.store.linear) if site.slides else site.store.linear  # a matrix product keeps nothing of the weight itself
        return call(site, x, site.bias)

    @property
    def weight(self) -> Tensor:
        return self.site.store.read()

    def _apply(self, fn, recurse=True):
        """Moves as other layers do; its constants keep their dtype, and what the numbers are made as changes instead."""
        was = dict(self._buffers)
        super()._apply(fn, recurse)
        for k, b in was.items():
            if k.startswith(PREFIX) and self._buffers[k].dtype != b.dtype:
                self._buffers[k] = b.to(self._buffers[k].device)
        codes = self._buffers[f"{PREFIX}codes"]
        self.compute = fn(torch.empty(0, dtype=self.compute, device=was[f"{PREFIX}codes"].device)).dtype if codes.device.type != "meta" else self.compute
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme.name}"


@cache
def packed_class(cls: type) -> type:
    """`class Packed<Name>(PackedLayer, <Name>)`, one for each class."""
    return _Made(f"Packed{cls.__name__}", (PackedLayer, cls), {"__module__": __name__, "own_class": cls})


copyreg.pickle(_Made, lambda cls: (packed_class, (cls.own_class,)))
