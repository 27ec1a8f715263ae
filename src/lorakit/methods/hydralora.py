"""HydraLoRA: one A, several B, and a router. Tian et al., 2024, arXiv 2404.19245.

    y = W x + s sum_k w_k B_k A x,   w = softmax(G x) over the n heads, for every token,   s = alpha / r

A (r, i), B (n, o, r) and the router G (n, i) train; A and G start as LoRA's A, every B_k at zero, so the output is the base's at step 0.
The router sees x without dropout and works in float32. The paper has no load-balancing loss. The weights depend on the input, so this
does not merge. With n = 1 it is LoRA. On a convolution the router is a filter of the layer's own size.
"""

from __future__ import annotations

import torch

from lorakit.method import Dynamic, Leaf, check_rank, kaiming, method, zeros


@method("hydralora", title="HydraLoRA", paper="2404.19245", formula="W x + s sum_k softmax(G x)_k B_k A x", laws=("identity",), aliases=("hydra-lora",))
class HydraLoRA(Dynamic):
    r: int = 4  # rank of each head
    alpha: float = 32.0  # strength: the update is scaled by alpha / r
    n: int = 4  # heads

    A = Leaf("r i", kaiming, key="lora_A.weight")
    B = Leaf("n o r", zeros, key="lora_B")
    G = Leaf("n i", kaiming, key="lora_route.weight")

    def __post_init__(self):
        check_rank("hydralora", self.r)
        check_rank("hydralora (heads)", self.n)

    def unfit(self, site):
        grouped = site.slides and site.g > 1
        return "hydralora's router needs all channels, and a grouped convolution has none that sees them" if grouped else super().unfit(site)

    def update(self, p, x, f, site, drop):
        dtype = x.dtype if x.is_floating_point() else site.dtype
        w = site.down(x, p["G"].to(dtype)).float().softmax(site.channel).to(dtype)
        h = site.down(drop(x), p["A"].to(dtype))
        mixed = (w.movedim(site.channel, -1)[..., None] * h.movedim(site.channel, -1)[..., None, :]).flatten(-2)  # (…, n r)
        B = p["B"].permute(1, 0, 2).flatten(1) * (self.alpha / self.r)  # (o, n r)
        return site.mix(mixed.movedim(-1, site.channel), B.to(dtype), last=True)

    def size(self, p):
        return (self.alpha / self.r) * torch.stack([(B @ p["A"]).norm() for B in p["B"]]).norm()
