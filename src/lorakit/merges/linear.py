"""Task arithmetic: the weighted sum. Ilharco et al., 2022, arXiv 2212.04089.

    ΔW = Σ w_t ΔW_t = [w_1 B_1 … w_n B_n] [A_1; …; A_n]

A negative weight takes a task away (forgetting). Exact in the factors, of rank Σ r_t; with `rank`, the nearest of that rank.
"""

from __future__ import annotations

from lorakit.errors import LorakitError
from lorakit.merges.base import Rule, rule, total


@rule("linear", "Weighted sum (task arithmetic)", "Σ w ΔW", "2212.04089")
class Linear(Rule):
    normalize: bool = False  # weights divided by their sum: a mean

    def check(self, weights):
        if self.normalize and not sum(weights):
            raise LorakitError("linear: the weights sum to 0, so they cannot be normalised")

    def without_base(self, weights):
        if not self.normalize and abs(sum(weights) - 1) > 1e-6:
            raise LorakitError(f"{self.name}: without a base, the weights must sum to 1, not {sum(weights):g}; mend: normalize=True, or base=")

    def merge(self, vectors, weights, at):
        return total(vectors, [w / sum(weights) for w in weights] if self.normalize else weights)
