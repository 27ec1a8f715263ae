"""DELLA: numbers dropped at random, the small ones more often; then elect and mean. Deep et al., 2024, arXiv 2406.11617.

    drop probability  p_j = p - ε/2 + ε k_j / n,   k_j = 0 … n-1 the place of |τ_j| in its row of n, the largest first,  p = 1 - density
    τ̂_j = m_j τ_j / (1 - p_j),  m_j ~ Bernoulli(1 - p_j);   then γ and the mean as in `ties`
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.merges.base import Elementwise, rule, share, space
from lorakit.merges.steps import disjoint_mean, drop, elect, weighted


def keep_probability(t: Tensor, density: float, epsilon: float) -> Tensor:
    """1 - p_j for every number of every row."""
    n = t.shape[-1]
    order = t.abs().argsort(dim=-1, descending=True, stable=True)
    place = torch.empty_like(t).scatter_(-1, order, torch.arange(n, dtype=t.dtype).expand(t.shape).contiguous())
    return density + epsilon / 2 - place * (epsilon / n)


@rule("della", "DELLA", "λ mean of m τ / (1 - p) of the elected sign, p by rank of |τ|", "2406.11617")
class DELLA(Elementwise):
    density: float = 0.5  # mean probability that a number stays
    epsilon: float = 0.2  # how far the probabilities of the largest and the smallest are apart
    scale: float = 1.0  # λ
    space: str = space()

    def __post_init__(self):
        share("della: density", self.density)
        if self.epsilon < 0 or self.density - self.epsilon / 2 <= 0 or self.density + self.epsilon / 2 > 1:
            raise LorakitError(f"della: density ± epsilon/2 must lie above 0 and at most at 1, not {self.density} ± {self.epsilon / 2}")

    def combine(self, tensors, weights, cuts, gen):
        some = weighted([drop(t, keep_probability(t, self.density, self.epsilon), gen) for t in tensors], weights)
        return disjoint_mean(some, weights, elect(some, "mass")) * self.scale
