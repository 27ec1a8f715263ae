"""PiSSA: the principal part of the weight trains, the rest is frozen. Meng et al., 2024, arXiv 2404.02948.

W = U S Vᵀ;  A = sqrt(S_r/s) V_rᵀ, B = U_r sqrt(S_r/s), so s B A is the best rank-r approximation of W for any alpha.
The start is subtracted (storage `offset`) or taken out of the base in memory (`base`): both give the same function and
the same gradients; `offset` leaves a 16-bit base unrounded. niter 0 is the exact decomposition, else randomised
subspace iteration with so many rounds (PEFT's pissa_niter_k). Weight decay pulls the principal part toward zero.
"""

from lorakit.inits import init
from lorakit.inits.base import put_triplets, seen
from lorakit.kernels.svd import fast_svd, thin_svd


@init("pissa", title="PiSSA", formula="s B A = U_r S_r V_rᵀ, W := W - s B A", paper="2404.02948", nonzero=True, aliases=("principal",))
def pissa(method, p, W, gen, *, niter: int = 0):
    W, r = seen(p, W()), p["A"].shape[0]
    U, S, Vh = fast_svd(W, r, niter, gen) if niter else thin_svd(W)
    put_triplets(method, p, U[:, :r], S[:r], Vh[:r])
