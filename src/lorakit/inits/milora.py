"""MiLoRA: the minor part of the weight trains. Wang et al., 2024, arXiv 2406.09044.

As PiSSA, but with the last r of the min(o, i) triplets. Needs the whole decomposition: fast ones find the top only.
"""

from lorakit.inits import init
from lorakit.inits.base import put_triplets, seen
from lorakit.kernels.svd import thin_svd


@init("milora", title="MiLoRA", formula="s B A = U_-r S_-r V_-rᵀ, W := W - s B A", paper="2406.09044", nonzero=True, aliases=("minor",))
def milora(method, p, W, gen):
    r = p["A"].shape[0]
    U, S, Vh = thin_svd(seen(p, W()))
    put_triplets(method, p, U[:, -r:], S[-r:], Vh[-r:])
