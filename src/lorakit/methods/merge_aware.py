"""Merge-aware training: any method on a quantised base, trained as the weight that merging it back makes.

    W' = q(V),   V = inner(W),   ∂W'/∂V := I        q: as the base's store rounds, its scales made anew from V

An update that is merged into a quantised base is mostly rounded away, since the codes next to W + ΔW are mostly W's own. Here the forward pass
has the rounding in it, and the gradient passes straight through (quantisation-aware training: Jacob et al., 2018, arXiv 1712.05877; the
estimator: Bengio et al., 2013, arXiv 1308.3432; with low rank: L4Q, Jeon et al., 2024, arXiv 2402.04902, which trains the scales, too). So what is
learnt is what `lorakit.merge(model, "requantize")` keeps. q changes no code of W, so W' = W at step 0, but for constants that are quantised
themselves (some 1e-4 of W). With dropout the update q(V) - W sees the dropped input.

Cost of a step: V is formed and rounded, and once more in the backward pass, in place of being kept; the leaves' gradients are the inner
method's own, without one of the size of W.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.kernels.straight_through import StraightThrough
from lorakit.maps import Base, Once, same
from lorakit.method import Method, Wrapper, method


@method("merge-aware", title="Merge-aware training", paper="2402.04902", formula="q(V), V = inner(W), the gradient of V")
class MergeAware(Wrapper):
    mergeable = "rounded"

    inner: Method

    def __post_init__(self):
        inner = self.inner
        if inner.mergeable != "exact" or inner.asks or inner.replaces or all(leaf.biased for leaf in inner.leaves.values()):
            raise LorakitError(f"merge-aware training means nothing for {inner.core.name}: there is no update of a weight that rounding with the base could "
                               "keep, or it is rounded already; mend: leave merge_aware out")

    def unfit(self, site):
        if site.store.idempotent:
            return self.inner.unfit(site)
        why = "is quantised by another library, whose rounding changes what it has rounded" if site.store.packs else "is not quantised"
        return (f"merge-aware training rounds base + update as a quantised base does, and this weight {why}; mend: quantize: nf4 (lorakit.quantize(model, …) "
                "before adapters), targets that it packs, or leave merge_aware out")

    def weight(self, p, W):
        raise LorakitError(f"merge-aware {self.inner.core.name} is rounded with the base, so without the quantised base no weight stands for it; mend: merge "
                           "on that base, or train without merge_aware")

    def unrounded(self, p, W):
        return self.inner.weight(p, W)

    def rounded(self, p, W, site):
        """q(V), without gradients; as precise under autocast as where it is merged."""
        with torch.no_grad(), torch.autocast(W.device.type, enabled=False):
            return site.rounded(self.unrounded(p, W)).to(W.dtype)

    def weight_at(self, p, W, site):
        return StraightThrough.apply(self.rounded(p, W, site), self.unrounded(p, W))

    def act(self, p, x, f, site, drop):
        dtype, xd = x.dtype if x.is_floating_point() else site.dtype, drop(x)

        def make():
            W = f.weight()
            V = self.rounded(p, W, site)
            return (V if xd is x else V - W).detach().to(dtype)

        y = site.op(xd, site.anew(make))
        y = y if xd is x else f(x) + y
        if not torch.is_grad_enabled():
            return y
        inner, still = self.inner, xd.detach()
        thin = inner.adds and (xd is not x or isinstance(f, Base | Once))  # nothing else that trains is in f, or f(x) has carried it already
        return StraightThrough.apply(y, (inner.update if thin else inner.act)(p, still, f, site, same))
