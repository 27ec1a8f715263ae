"""LoRA-XS: a tiny core between singular vectors. Bałazy et al., 2024, arXiv 2405.17604.

    W = U diag(σ) Vᵀ,   A = diag(σ_r) V_rᵀ,   B = U_r,   W' = W + (alpha / r) B R A

R (r, r) trains, r² numbers whatever the layer's width; A (r, i) and B (o, r) are frozen. The singular values are on the side of the input, as in
the authors' code. R starts normal with deviation 1e-5, so W' is W up to about 1e-5 at step 0. The decomposition is the exact one in float32 with
fixed signs, but equal singular values leave their vectors free, so A and B are written to the file unless save_projection is off: then
the file is tiny, and means what it meant only on the very same base weights.
"""

from __future__ import annotations

import dataclasses

from lorakit.kernels.svd import thin_svd
from lorakit.method import Leaf, LowRank, check_rank, method, normal, zeros


@method("lora-xs", title="LoRA-XS", paper="2405.17604", formula="W + s B R A, A and B frozen singular vectors of W", laws=("rank<=r",))
class LoRAXS(LowRank):
    r: int = 32  # rank
    alpha: float = 64.0  # strength: the update is scaled by alpha / r
    save_projection: bool = True  # A and B are written to the file, too

    A = Leaf("r i", zeros, trains=False, key="lora_A.weight")
    B = Leaf("o r", zeros, trains=False, key="lora_B.weight")
    R = Leaf("r r", normal(1e-5), key="lora_latent_mapping.weight")

    def __post_init__(self):
        check_rank("lora-xs", self.r)

    @classmethod
    def examples(cls):
        return [cls(3, 7.0), cls(2, 5.0, False), cls(1, 3.0)]

    @property
    def leaves(self):
        return {k: dataclasses.replace(leaf, derived=not leaf.trains and not self.save_projection) for k, leaf in self.own.items()}

    @property
    def reads_base(self):
        return not self.save_projection

    def unfit(self, site):
        k = min(site.out, site.in_)
        return f"lora-xs: r={self.r} does not fit a layer of {k} singular directions; mend: a smaller r there (rank_pattern)" if self.r > k else None

    def derive(self, p, W):
        U, S, Vh = thin_svd(W())
        p["A"].copy_(S[: self.r, None] * Vh[: self.r])
        p["B"].copy_(U[:, : self.r])

    def settle(self, p, W):
        if self.save_projection:
            self.derive(p, W)

    def factors(self, p):
        return p["B"] * (self.alpha / self.r), p["R"], p["A"]
