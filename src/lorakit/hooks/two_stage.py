"""Two stages: one adapter for the first part of training, a fresh one on top of it for the rest. The co-update of the surveys, generically.

    W1 = W + s B1 A1 after the first stage,   W2 = W1 + s B2 A2       rank(ΔW) <= 2 r

A chain (COLA) of two links with the knot anywhere, and a ramp of the rate behind it. The second stage begins at the loss at
which the first ended. Saved as one LoRA of rank 2 r.
"""

from __future__ import annotations

from lorakit.errors import LorakitError
from lorakit.hooks.base import hook
from lorakit.hooks.relora import Restarts


@hook("two_stage", "Two-stage incremental", "", "ΔW = s B1 A1 + s B2 A2, one after the other")
class TwoStage(Restarts):
    at: float = 0.5  # where the second stage begins: a share of all steps, or a step where it is 1 or more
    warmup: int = 10  # steps at the beginning of the second stage in which the rate rises from 0 again; 0: none
    seed: int = 0  # of the restart

    def __post_init__(self):
        if self.at <= 0 or self.warmup < 0:
            raise LorakitError(f"two_stage: `at` must be above 0 and warmup not below it, not {self.at}, {self.warmup}")

    def start(self, model, optimizer, total):
        super().start(model, optimizer, total)
        if self.at < 1 and not total:
            raise LorakitError("two_stage: how many steps there will be is not known here; mend: at: (a step)")

    def due(self, step):
        return step == max(1, round(self.at if self.at >= 1 else self.at * self.total))
