"""DoRA's weight decomposition, around any method. Liu et al., 2024, arXiv 2402.09353.

    W' = diag(m / |V|) V,   V = inner(W),   |V| the norm of every row (one per output)

m (o) trains beside the inner method's leaves and starts at |V|, so W' = V at step 0. As in the paper the gradient
takes |V| as a constant (`detach`). The bias is not scaled. Around LoRA this is DoRA; around VeRA, DVoRA.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from lorakit.errors import LorakitError
from lorakit.method import Leaf, Method, Wrapper, method, method_from_peft, ones


@method("magnitude", title="DoRA magnitude", paper="2402.09353", formula="diag(m / |V|) V, V = inner(W)",
        laws=("row_norm=m", "identity"))
class Magnitude(Wrapper):
    inner: Method
    detach: bool = True  # the norm is a constant for the gradient, as in the paper; false: differentiate through it

    m = Leaf("o", ones, key="lora_magnitude_vector")

    def __post_init__(self):
        if "row_gain" in self.inner.laws or self.inner.replaces or "m" in self.inner.leaves or self.inner.mergeable != "exact":
            raise LorakitError(f"magnitude around {self.inner.name} means nothing: the norm cancels it, there is one already, or there is no weight to norm")

    def unfit(self, site):
        return "a row of one number has no direction for a magnitude" if site.in_ == 1 else self.inner.unfit(site)

    def settle(self, p, W):
        self.inner.settle(p, W)
        p["m"].copy_(self.inner.weight(p, W()).norm(dim=1))

    def gain(self, p, norm):  # (o,); a row that is all zero stays so
        return p["m"] / norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def weight(self, p, W):
        V = self.inner.weight(p, W)
        norm = V.norm(dim=1)
        return self.gain(p, norm.detach() if self.detach else norm)[:, None].to(V.dtype) * V

    def act(self, p, x, f, site, drop):
        with torch.no_grad() if self.detach else nullcontext():
            norm = self.inner.row_norm(p, f)
        return self.inner.gained(p, x, f, site, drop, self.gain(p, norm))

    def to_peft(self):
        inner = self.inner.to_peft()
        return inner | {"use_dora": True} if inner and "use_dora" in inner and self.detach else None

    @classmethod
    def from_peft(cls, config):
        return cls(method_from_peft(config | {"use_dora": False})) if config.get("use_dora") else None
