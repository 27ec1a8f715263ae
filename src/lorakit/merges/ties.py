"""TIES: trim, elect signs, mean of those that agree. Yadav et al., 2023, arXiv 2306.01708.

    τ̂_t = τ_t where |τ_t| is among the largest int(density · N), else 0
    γ = sgn Σ w_t τ̂_t
    ΔW = λ · Σ_{t: sgn(w_t τ̂_t) = γ} w_t τ̂_t / Σ_{the same t} |w_t|

With weights of 1 this is the paper's. The authors' code trims over all targets of an adapter together: scope "global".
"""

from __future__ import annotations

from lorakit.merges.base import Elementwise, rule, scope, share, space
from lorakit.merges.steps import disjoint_mean, elect, trim, weighted
from lorakit.method import choice


@rule("ties", "TIES", "λ mean of top(τ) of the elected sign", "2306.01708")
class TIES(Elementwise):
    density: float = 0.2  # share of the numbers that stay
    scale: float = 1.0  # λ
    sign: str = choice("mass", ("mass", "count"))  # elected by the sum of the numbers, or of their signs
    scope: str = scope()
    space: str = space()

    def __post_init__(self):
        share("ties: density", self.density)

    @property
    def kept(self):
        return (self.density,)

    def combine(self, tensors, weights, cuts, gen):
        some = weighted([trim(t, c[0]) for t, c in zip(tensors, cuts, strict=True)], weights)
        return disjoint_mean(some, weights, elect(some, self.sign)) * self.scale
