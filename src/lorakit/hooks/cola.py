"""COLA, a chain of LoRAs: each link learns what the ones before it left. Xia, Qin, Hazan, 2024, arXiv 2401.04151.

    link m: train (A_m, B_m) on W,  then tie a knot: W := W + s B_m A_m, new A and B, a fresh optimiser     ΔW = s Σ_m B_m A_m

No schedule of its own (ReLoRA has one). The optimiser forgets the tied factors wholly, step counter and all: keeping the old
averages for a restarted tensor is the usual mistake. Saved as one LoRA whose rank is that of all links together.
"""

from __future__ import annotations

from lorakit.errors import LorakitError
from lorakit.hooks.base import hook
from lorakit.hooks.relora import Restarts


@hook("cola", "COLA", "2401.04151", "ΔW = s Σ B_m A_m, one link after the other")
class COLA(Restarts):
    links: int = 3  # links of equal length; used where `every` is 0
    every: int = 0  # optimiser steps in a link; 0: as `links` says
    seed: int = 0  # of the restarts

    def __post_init__(self):
        if self.links < 1 or self.every < 0:
            raise LorakitError(f"cola: at least one link of at least one step, not links {self.links}, every {self.every}")

    def start(self, model, optimizer, total):
        super().start(model, optimizer, total)
        if not self.every and not total:
            raise LorakitError("cola: how many steps there will be is not known here; mend: every: (steps in a link)")

    def due(self, step):
        if self.every:
            return step % self.every == 0
        return step in {round(self.total * m / self.links) for m in range(1, self.links)}
