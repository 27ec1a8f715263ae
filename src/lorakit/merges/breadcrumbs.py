"""Model Breadcrumbs: the largest outliers and the small numbers go. Davari and Belilovsky, 2023, arXiv 2312.06795.

    ΔW = Σ w_t τ_t ⊙ [|τ_t| not among the largest int(gamma · N), but among the largest int((gamma + density) · N)]
"""

from __future__ import annotations

from lorakit.errors import LorakitError
from lorakit.merges.base import Elementwise, rule, scope, share, space
from lorakit.merges.steps import summed, trim, weighted


@rule("breadcrumbs", "Model Breadcrumbs", "Σ w band(τ)", "2312.06795")
class Breadcrumbs(Elementwise):
    density: float = 0.2  # share of the numbers that stay
    gamma: float = 0.01  # share of the largest that go
    scope: str = scope()
    space: str = space()

    def __post_init__(self):
        share("breadcrumbs: density", self.density)
        if not 0 <= self.gamma <= 1 - self.density:
            raise LorakitError(f"breadcrumbs: gamma must be at least 0 and at most 1 - density = {1 - self.density:g}, not {self.gamma}")

    @property
    def kept(self):
        return self.gamma, self.gamma + self.density

    def combine(self, tensors, weights, cuts, gen):
        return summed(weighted([trim(t, c[1], c[0]) for t, c in zip(tensors, cuts, strict=True)], weights))
