"""LQ-LoRA: low rank plus quantised, factored first. Guo et al., 2023, arXiv 2311.12023.

Q_0 = 0;  L_t = the best rank-r approximation of W - Q_(t-1),  Q_t = q(W - L_t), until |W - Q_t - L_t| grows; the last pair before that is kept
(the official code keeps the one that grew). base := Q, s B A := L.

The bits of every matrix are chosen apart: `lorakit.quantized.bits.allot`.
"""

import torch

from lorakit.inits import init
from lorakit.inits.base import put_triplets, quantised, seen, unseen
from lorakit.kernels.svd import fast_svd, thin_svd


@init("lq-lora", title="LQ-LoRA", formula="L = s B A = SVD_r(W - Q), Q = q(W - L), until it gets no better", paper="2311.12023", nonzero=True, joint=True)
def lq_lora(method, p, W, gen, *, steps: int = 20, niter: int = 0):
    whole, r = quantised("lq-lora", W), p["A"].shape[0]
    Q, best = torch.zeros_like(whole), None
    for _ in range(max(steps, 1)):
        gap = seen(p, whole - Q)
        U, S, Vh = fast_svd(gap, r, niter, gen) if niter else thin_svd(gap)
        L = unseen(whole, (U[:, :r] * S[:r]) @ Vh[:r])
        Q = W.rounded(whole - L)
        error = float((whole - Q - L).norm())
        if best is not None and error >= best[0]:
            break
        best = error, (U[:, :r], S[:r], Vh[:r]), whole - L
    put_triplets(method, p, *best[1])
    return best[2]
