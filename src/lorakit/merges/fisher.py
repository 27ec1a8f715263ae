"""Fisher merging: every number weighed by how much it matters to its task. Matena and Raffel, 2021, arXiv 2111.09832.

    ΔW = Σ w_t F_t ⊙ τ_t / Σ w_t F_t,   F_t (o, i) = mean over examples of (∂ log p(y|x) / ∂ΔW)²

`lorakit.merges.stats.fisher` collects F_t. A floor, this part of F_t's mean, stands under it, so that nothing is divided by 0.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.merges.base import Rule, Vector, rule


@rule("fisher", "Fisher merging", "Σ w F τ / Σ w F", "2111.09832")
class Fisher(Rule):
    needs = "fisher"
    full = True

    floor: float = 1e-6  # as a part of the mean of F

    def check(self, weights):
        if min(weights) < 0:
            raise LorakitError(f"fisher: the weights must not be negative: {min(weights)}")

    def without_base(self, weights):
        pass

    def merge(self, vectors, weights, at):
        above, below = torch.zeros(vectors[0].shape), torch.zeros(vectors[0].shape)
        for v, w, F in zip(vectors, weights, at.stats, strict=True):
            F = torch.ones(v.shape) if F is None else F.float() + self.floor * F.float().mean() + 1e-30
            above += w * F * v.dense()
            below += w * F
        return Vector(matrix=above / below)
