"""L²QER: LQER with every input weighted by its size. Zhang et al., 2024, arXiv 2402.02446.

E = W - q(W), D = diag(d), d_j = max over batches of the mean over tokens of |x_j|, at least 1e-4, over sqrt(min d · max d);
s B A D = the best rank-r approximation of E D: A = Vᵀ D⁻¹, B = U S / s. d depends on the size of the batches.
"""

import torch

from lorakit.inits import init
from lorakit.inits.base import quantised, seen, strength, watch
from lorakit.kernels.svd import thin_svd


def sizes(model, targets, data, options):
    """Path -> d (i,)."""
    found = {}

    def take(path, rows):
        mean = rows.abs().mean(0).cpu()
        found[path] = torch.maximum(found[path], mean) if path in found else mean

    watch("l2qer", model, {p: site for p, (_, site) in targets.items()}, data, take)
    clamped = {p: d.clamp_min(1e-4) for p, d in found.items()}
    return {p: d / (d.min() * d.max()).sqrt() for p, d in clamped.items()}


@init("l2qer", title="L²QER", formula="s B A = SVD_r((W - q(W)) D) D⁻¹, D the size of the inputs", paper="2402.02446", nonzero=True, mends=True, collect=sizes)
def l2qer(method, p, W, gen, *, found):
    whole, r = quantised("l2qer", W), p["A"].shape[0]
    U, S, Vh = thin_svd(seen(p, whole - W.rounded(whole)) * found)
    p["A"].copy_(Vh[:r] / found)
    p["B"].copy_(U[:, :r] * S[:r] / strength(method))
