"""RegMean: the weight whose outputs are nearest to all of its sources' on their own inputs. Jin et al., 2022, arXiv 2212.09849.

    ΔW = (Σ w_t ΔW_t G̃_t) (Σ w_t G̃_t)⁻¹,   G_t (i, i) = mean over tokens of x xᵀ,   G̃ = α G + (1 - α) diag(G)

W's own part cancels. In the factors: [B_1 … B_n] [w_1 A_1 G̃_1; …] (Σ w G̃)⁻¹, of rank Σ r_t. `lorakit.merges.stats.grams` collects G_t;
a target without them (an embedding) gets the weighted mean. `ridge`, this part of the diagonal's mean, keeps the sum invertible.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.merges.base import Rule, Vector, rule, share, total


@rule("regmean", "RegMean", "Σ w ΔW G̃ (Σ w G̃)⁻¹", "2212.09849")
class RegMean(Rule):
    needs = "gram"

    alpha: float = 0.9  # what is kept of the Gram matrices' off-diagonal part
    ridge: float = 1e-6

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise LorakitError(f"regmean: alpha must be from 0 to 1, not {self.alpha}")
        share("regmean: ridge", self.ridge, -1e-12)

    def check(self, weights):
        if min(weights) < 0:
            raise LorakitError(f"regmean: the weights must not be negative: {min(weights)}")

    def without_base(self, weights):
        pass

    def merge(self, vectors, weights, at):
        if any(G is None for G in at.stats):
            return total(vectors, [w / sum(weights) for w in weights])
        grams = [w * (self.alpha * G.double() + (1 - self.alpha) * torch.diag(G.double().diagonal())) for w, G in zip(weights, at.stats, strict=True)]
        whole = sum(grams)
        whole = whole + self.ridge * whole.diagonal().mean() * torch.eye(len(whole), dtype=torch.float64)
        parts = [Vector((v.factors[0], v.factors[1].double() @ G)) if v.factors is not None else Vector(matrix=v.dense().double() @ G)
                 for v, G in zip(vectors, grams, strict=True)]
        if all(v.factors is not None for v in parts):
            B, A = total(parts, [1.0] * len(parts)).factors
            return Vector((B.float(), torch.linalg.solve(whole, A.double().mT).mT.float()))
        D = sum((p.matrix if p.factors is None else p.factors[0].double() @ p.factors[1]) for p in parts)
        return Vector(matrix=torch.linalg.solve(whole, D.mT).mT.float())
