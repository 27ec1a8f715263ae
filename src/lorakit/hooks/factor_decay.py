"""L2 on the factors, in the loss. Three different things go by the name of weight decay on LoRA:

    decoupled (`weight_decay` of the training):  p := p - lr · wd · p                         every matrix that trains
    factors:   loss + λ Σ (|A|² + |B|²)          for a given product its minimum is 2 λ |B A|_*, so it favours low rank
    product:   loss + λ Σ |s B A|²               = λ s² Σ tr((Bᵀ B) (A Aᵀ)), the size of the update itself

With a start that is not zero and was taken out of the base, all of them pull back what was taken out.
"""

from __future__ import annotations

from lorakit.errors import LorakitError
from lorakit.hooks import rounds
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.factors import pairs
from lorakit.method import choice


@hook("factor_decay", "L2 on the factors", "", "loss + λ Σ (|A|² + |B|²)")
class FactorDecay(Hook):
    weight: float = 1e-4  # λ
    of: str = choice("factors", ("factors", "product"))  # what is kept small

    def __post_init__(self):
        if self.weight < 0:
            raise LorakitError(f"factor_decay: weight must be at least 0, not {self.weight}")

    def setup(self, model):
        self.pairs = pairs(model, "factor_decay")
        for p in self.pairs if self.of == "product" else ():
            rounds.lora_like(p.method, "factor_decay (product)", p.path, anew=False)

    def extra_loss(self, model, outputs):
        if self.of == "factors":
            return self.weight * sum(p.A.square().sum() + p.B.square().sum() for p in self.pairs)
        return self.weight * sum(p.s**2 * ((p.B.mT @ p.B) * (p.A @ p.A.mT)).sum() for p in self.pairs)
