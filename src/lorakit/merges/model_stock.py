"""Model Stock: how far to go from the base towards the mean, told by the angle between the task vectors. Jang et al., 2024, arXiv 2403.19522.

    ΔW = t · (1/n) Σ ΔW_t,   t = n cos θ / (1 + (n - 1) cos θ)

cos θ: the mean of the cosines of all pairs, of each target (the paper's way) or of whole adapters (scope "global").
"""

from __future__ import annotations

from lorakit.errors import LorakitError
from lorakit.merges.base import Spanning, cosines, rule, scope


@rule("model-stock", "Model Stock", "t mean(ΔW), t = n cosθ / (1 + (n-1) cosθ)", "2403.19522")
class ModelStock(Spanning):
    weighs = False

    scope: str = scope()

    def check(self, weights):
        if len(weights) < 2:
            raise LorakitError("model-stock needs at least two adapters")

    def coefficients(self, G, weights):
        n, C = len(G), cosines(G)
        cos = float((C.sum() - C.diagonal().sum()) / (n * (n - 1)))
        below = 1 + (n - 1) * cos
        return [cos / below if below > 1e-12 else 0.0] * n
