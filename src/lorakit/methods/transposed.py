"""The same update on a transposed weight: an output head that is tied to an embedding follows its adapter.

    W' = inner(Wᵀ)ᵀ

No leaves of its own: on a tied head the leaves are the embedding's very tensors.
"""

from __future__ import annotations

import copy

from lorakit.errors import LorakitError
from lorakit.method import Method, Origin, Wrapper, method


@method("transposed", title="Tied, transposed", formula="inner(Wᵀ)ᵀ", laws=("identity",))
class Transposed(Wrapper):
    inner: Method

    def __post_init__(self):
        leaves = self.inner.leaves.values()
        own_bias = any(leaf.key.endswith(".bias") and not leaf.biased for leaf in leaves)
        if self.inner.mergeable == "no" or type(self.inner).transposed is not Method.transposed or own_bias or all(leaf.biased for leaf in leaves):
            raise LorakitError(f"transposed around {self.inner.name} means nothing: it says itself how, or acts on the bias")

    @property
    def laws(self):
        return tuple(law for law in self.inner.laws if law in self.card.laws)

    @property
    def core(self):
        return Transposed(self.inner.core)

    @property
    def replaces(self):
        return self.inner.replaces

    @property
    def follows(self):
        return self.inner.follows

    @property
    def adds(self):
        return self.inner.adds

    def dims(self, o, i):
        return self.inner.dims(i, o)

    def shapes(self, o, i, bias=False):
        return self.inner.shapes(i, o)

    def unfit(self, site):
        if site.slides or site.read:
            return "a transposed update needs a layer that is called, not a convolution or a parameter"
        flipped = copy.copy(site)
        flipped.out, flipped.in_, flipped.lookup = site.in_, site.out, not site.lookup
        return self.inner.unfit(flipped)

    def on(self, site):
        return self  # the inner method sees the transposed geometry

    def start(self, o, i, origin, gen, given=None):
        return self.inner.start(i, o, Origin(lambda: origin().mT), gen, given)

    def settle(self, p, W):
        self.inner.settle(p, lambda: W().mT)

    def derive(self, p, W):
        self.inner.derive(p, lambda: W().mT)

    def transposed(self):
        return self.inner

    def bias(self, p, b):
        return b

    def weight(self, p, W):
        return self.inner.weight(p, W.mT).mT

    def act(self, p, x, f, site, drop):
        return f(x) + self.update(p, x, f, site, drop) if self.adds else super().act(p, x, f, site, drop)

    def update(self, p, x, f, site, drop):
        if not self.adds:
            return super().update(p, x, f, site, drop)
        dtype, two = x.dtype if x.is_floating_point() else site.dtype, self.two(p)
        if two is not None:
            return site.chain(drop(x), *(F.to(dtype) for F in two))
        W = f.weight()
        return site.op(drop(x), (self.weight(p, W) - W).to(dtype))

    def two(self, p):
        two = self.inner.two(p)
        return None if two is None else (two[1].mT, two[0].mT)
