"""The weighted sum at the rank of the largest source: the best of that rank, from the factors alone.

    [w_1 B_1 … w_n B_n] = Q_B R_B,  [A_1; …; A_n]ᵀ = Q_A R_A,  R_B R_Aᵀ = U diag(σ) Vᵀ   →   Q_B U_q diag(σ_q) V_qᵀ Q_Aᵀ

What is left out is sqrt(Σ_{i>q} σ_i²); with `rank` of Σ r_t it is nothing.
"""

from __future__ import annotations

from lorakit.merges.base import rule
from lorakit.merges.linear import Linear


@rule("svd", "Weighted sum at a rank", "svd_q(Σ w ΔW)")
class SVD(Linear):
    lowers = True
