"""Pruning by magnitude, then the weighted sum: the largest numbers of each task vector stay, unscaled.

    ΔW = Σ w_t τ_t ⊙ [|τ_t| among the largest int(density · N)]
"""

from __future__ import annotations

from lorakit.merges.base import Elementwise, rule, scope, share, space
from lorakit.merges.steps import summed, trim, weighted


@rule("magnitude-prune", "Magnitude pruning", "Σ w top(τ)")
class MagnitudePrune(Elementwise):
    density: float = 0.2  # share of the numbers that stay
    scope: str = scope()
    space: str = space()

    def __post_init__(self):
        share("magnitude-prune: density", self.density)

    @property
    def kept(self):
        return (self.density,)

    def combine(self, tensors, weights, cuts, gen):
        return summed(weighted([trim(t, c[0]) for t, c in zip(tensors, cuts, strict=True)], weights))
