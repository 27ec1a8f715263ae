"""LQER: the factors give back what quantising lost. Zhang et al., 2024, arXiv 2402.02446.

E = W - q(W), s B A = the best rank-r approximation of E; all singular values in B: A = Vᵀ, B = U S / s. The base stays as it is, the function
moves toward that of the unquantised model. No training is needed; what trains later starts from there.
"""

from lorakit.inits import init
from lorakit.inits.base import quantised, seen, strength
from lorakit.kernels.svd import fast_svd, thin_svd


@init("lqer", title="LQER", formula="s B A = SVD_r(W - q(W))", paper="2402.02446", nonzero=True, mends=True)
def lqer(method, p, W, gen, *, niter: int = 0):
    whole, r = quantised("lqer", W), p["A"].shape[0]
    gap = seen(p, whole - W.rounded(whole))
    U, S, Vh = fast_svd(gap, r, niter, gen) if niter else thin_svd(gap)
    p["A"].copy_(Vh[:r])
    p["B"].copy_(U[:, :r] * S[:r] / strength(method))
