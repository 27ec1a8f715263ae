"""The weight of a layer that `lorakit.quantize` has packed: made anew where it is read, a piece at a time where it is multiplied with.

No dense copy outlives a product: the backward pass makes the matrix again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit.stores.dense import Store
from lorakit.stores.layer import PREFIX, PackedLayer
from lorakit.stores.product import Product
from lorakit.stores.saved import made
from lorakit.stores.scheme import Parts, has_values


class Packed(Store):
    """The weight of a layer that `lorakit.quantize` has packed."""

    title, formula = "packed weight", "scheme(parts)"
    packs = True
    idempotent = True

    def __init__(self, module: PackedLayer):
        super().__init__(module)
        self.eps = module.scheme.eps

    @staticmethod
    def claims(module):
        return isinstance(module, PackedLayer)

    @property
    def parts(self) -> Parts:
        return {k.removeprefix(PREFIX): b for k, b in self.module._buffers.items() if k.startswith(PREFIX)}

    @property
    def token(self):
        return self.module._buffers[f"{PREFIX}codes"]

    @property
    def dtype(self):
        return self.module.compute

    @property
    def device(self):
        return self.token.device

    @property
    def shape(self):
        return self.module.raw

    def read(self, dtype=None):
        m, dtype = self.module, dtype or self.module.compute

        def make() -> Tensor:
            return m.scheme.matrix(self.parts, *m.shape, dtype)

        M = made(make)
        return M.mT if m.turned else M.view(m.raw)

    def write(self, W):
        self.fill(W.to(self.device))

    def fill(self, W: Tensor) -> None:
        """Packs a weight, on the device where it is; one without values gives parts without."""
        m = self.module
        if has_values(W):
            parts = m.scheme.parts((W.mT if m.turned else W).reshape(m.shape))
        else:
            parts = {k: W.new_empty(size, dtype=dtype) for k, (size, dtype) in m.scheme.layout(*m.shape).items()}
        m._buffers.update({PREFIX + k: part for k, part in parts.items()})

    def shift(self, delta: Tensor) -> None:
        """Adds a matrix (o, i) that is constant over the groups to their zero points. LorakitError where it is not, or there are none."""
        m = self.module
        delta = delta.mT if m.site.lookup else delta
        slack = 1e-5 * float(delta.norm()) + 1e-6 * float(self.read(torch.float32).norm())
        parts = m.scheme.shifted(self.parts, delta, m.shape, slack)
        parts["codes"] = parts["codes"].view(-1)  # another object, by which what is kept of the weight is known to be old
        m._buffers.update({PREFIX + k: part for k, part in parts.items()})

    def rounded(self, W):
        m = self.module
        M = (W.mT if m.turned else W).reshape(m.shape)
        M = m.scheme.matrix(m.scheme.parts(M), *m.shape, torch.float32)
        return M.mT if m.turned else M.view(m.raw)

    def original(self):
        kept = self.module.original
        return kept if kept is None or isinstance(kept, Tensor) else kept()

    def take(self):
        return {k: b for k, b in self.module._buffers.items() if k.startswith(PREFIX)}

    def put(self, kept):
        self.module._parameters.pop("weight", None)  # where it was thawed
        self.module._buffers.update(kept)

    def tensors(self, kept):
        return kept

    @property
    def plain(self):
        return next(c.own_class for c in type(self.module).__mro__ if PackedLayer in c.__bases__)

    def thaw(self, W):
        for k in self.take():
            del self.module._buffers[k]
        self.module._parameters["weight"] = nn.Parameter(W.detach().to(self.dtype).contiguous(), requires_grad=False)

    def linear(self, site, x, bias):
        m = self.module
        if site.lookup:
            return self._look_up(site, x)
        if site.slides:
            return site.op(x, site.view(self.read(x.dtype)), bias)
        parts = self.parts
        return Product.apply(x, bias, m.scheme, m.shape, tuple(parts), *parts.values(), *[None] * (4 - len(parts)))

    def _look_up(self, site, ids: Tensor) -> Tensor:
        """Only the rows that are asked for are made, where the scheme can."""
        m = self.module
        few, at = ids.unique(return_inverse=True)
        rows = m.scheme.rows(self.parts, few, m.shape, m.compute)
        return site.op(ids, site.view(self.read())) if rows is None else site.op(at, rows.mT)
