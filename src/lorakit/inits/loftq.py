"""LoftQ: the quantised base and the factors made together. Li et al., 2023, arXiv 2310.08659.

L_0 = 0;  for t = 1 … T:  Q_t = q(W - L_(t-1)),  L_t = the best rank-r approximation of W - Q_t;  base := Q_T, s B A := L_T.

Quantised first, factored second, so |W - Q - s B A| ≤ |W - Q|. The singular values are shared evenly: A = sqrt(S/s) Vᵀ, B = U sqrt(S/s), which
holds for every alpha (the official code and PEFT leave s out). niter 0: the exact decomposition, else randomised subspace iteration.
"""

import torch

from lorakit.inits import init
from lorakit.inits.base import put_triplets, quantised, seen, unseen
from lorakit.kernels.svd import fast_svd, thin_svd


@init("loftq", title="LoftQ", formula="Q = q(W - L), L = s B A = SVD_r(W - Q), T times", paper="2310.08659", nonzero=True, joint=True)
def loftq(method, p, W, gen, *, steps: int = 5, niter: int = 0):
    whole, r = quantised("loftq", W), p["A"].shape[0]
    L = torch.zeros_like(whole)
    for _ in range(max(steps, 1)):
        rest = whole - L
        gap = seen(p, whole - W.rounded(rest))
        U, S, Vh = fast_svd(gap, r, niter, gen) if niter else thin_svd(gap)
        L = unseen(whole, (U[:, :r] * S[:r]) @ Vh[:r])
    put_triplets(method, p, U[:, :r], S[:r], Vh[:r])
    return rest
