"""DARE, then TIES' election and disjoint mean. Yu et al., 2023, arXiv 2311.03099; arXiv 2306.01708.

    τ̂_t = m_t ⊙ τ_t / density,  m_t ~ Bernoulli(density);   then γ and the mean as in `ties`
"""

from __future__ import annotations

from lorakit.merges.base import Elementwise, rule, share, space
from lorakit.merges.steps import disjoint_mean, drop, elect, weighted
from lorakit.method import choice


@rule("dare-ties", "DARE with TIES", "λ mean of m τ / p of the elected sign", "2311.03099")
class DARETIES(Elementwise):
    density: float = 0.5  # probability that a number stays
    scale: float = 1.0  # λ
    sign: str = choice("mass", ("mass", "count"))
    space: str = space()

    def __post_init__(self):
        share("dare-ties: density", self.density)

    def combine(self, tensors, weights, cuts, gen):
        some = weighted([drop(t, self.density, gen) for t in tensors], weights)
        return disjoint_mean(some, weights, elect(some, self.sign)) * self.scale
