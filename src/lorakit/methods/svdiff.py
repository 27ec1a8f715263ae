"""SVDiff: shifted singular values. Han et al., 2023, arXiv 2303.11305. Without the ReLU, SAM-PARSER: Peng et al., 2023, arXiv 2308.14604.

    W = U diag(σ) Vᵀ,   W' = U diag(relu(σ + scale · δ)) Vᵀ

δ (k), k = min(o, i), trains and starts at zero, so W' = W at step 0. SAM-PARSER trains σ itself and lets it go below zero: the same thing in
terms of δ. The decomposition is of full thin rank (SAM-PARSER's script rounds k down to a multiple of 4, and then W' is not W at step 0). U, σ
and V come from the base wherever the adapter is put on or loaded; a file holds δ alone. In memory they cost k (o + i + 1) numbers, more than W.
The ReLU stops the gradient of a value that has reached zero.
"""

from __future__ import annotations

from lorakit.kernels.svd import thin_svd
from lorakit.method import Leaf, LowRank, method, zeros


@method("svdiff", title="SVDiff", paper="2303.11305", formula="U diag(relu(σ + scale δ)) Vᵀ, W = U diag(σ) Vᵀ", laws=("identity",))
class SVDiff(LowRank):
    reads_base = True

    scale: float = 1.0  # how much of the shift counts
    relu: bool = True  # a singular value stops at zero; false: SAM-PARSER, it may go below

    shift = Leaf("k", zeros)
    U = Leaf("o k", zeros, trains=False, derived=True)
    S = Leaf("k", zeros, trains=False, derived=True)
    Vh = Leaf("k i", zeros, trains=False, derived=True)

    @classmethod
    def examples(cls):
        return [cls(0.6), cls(relu=False)]

    def dims(self, o, i):
        return super().dims(o, i) | {"k": min(o, i)}

    def derive(self, p, W):
        for k, t in zip(("U", "S", "Vh"), thin_svd(W()), strict=True):
            p[k].copy_(t)

    def factors(self, p):
        S = p["S"] + self.scale * p["shift"]
        return p["U"], (S.relu() if self.relu else S) - p["S"], p["Vh"]
