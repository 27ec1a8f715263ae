"""DARE, then the weighted sum: numbers dropped at random, the rest scaled up. Yu et al., 2023, arXiv 2311.03099.

    ΔW = Σ w_t m_t ⊙ τ_t / density,   m_t ~ Bernoulli(density)
"""

from __future__ import annotations

from lorakit.merges.base import Elementwise, rule, share, space
from lorakit.merges.steps import drop, summed, weighted


@rule("dare-linear", "DARE", "Σ w m τ / p", "2311.03099")
class DARELinear(Elementwise):
    density: float = 0.5  # probability that a number stays: 1 minus the paper's drop rate
    space: str = space()

    def __post_init__(self):
        share("dare-linear: density", self.density)

    def combine(self, tensors, weights, cuts, gen):
        return summed(weighted([drop(t, self.density, gen) for t in tensors], weights))
