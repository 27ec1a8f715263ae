"""XGBLoRA: boosting with rank-1 learners, each on a few layers. Zhang et al., 2024, arXiv 2410.19694.

    W_T = W + Σ_t s B_t A_t,   B_t A_t of rank 1,   booster t on a random subset of the blocks, κ steps

After κ steps a booster is taken into the base, the optimiser forgets it, and the next subset is drawn. In the blocks left out the
adapter is zero and stays so. The paper's text and its formula disagree about a penalty on |A|, |B|: none here (`factor_decay` is
one). Use it with r: 1. Saved as one LoRA; a block's rank is the number of boosters that chose it.
"""

from __future__ import annotations

from lorakit.errors import LorakitError
from lorakit.hooks.base import hook
from lorakit.hooks.factors import by_block
from lorakit.hooks.relora import Restarts
from lorakit.hooks.surgery import some


@hook("xgblora", "XGBLoRA", "2410.19694", "ΔW = s Σ_t B_t A_t, rank 1, each on a few layers")
class XGBLoRA(Restarts):
    boosters: int = 8  # how many, of equal length; used where `every` is 0
    every: int = 0  # κ: optimiser steps of a booster; 0: as `boosters` says
    layers: int = 0  # how many blocks a booster is on; 0: a third of them
    seed: int = 0  # of the restarts and of the choice of layers

    def __post_init__(self):
        if self.boosters < 1 or self.every < 0 or self.layers < 0:
            raise LorakitError(f"xgblora: boosters, every and layers count something, not {self.boosters}, {self.every}, {self.layers}")

    def setup(self, model):
        super().setup(model)
        self.blocks, _ = by_block(model, "xgblora")
        self.n = self.layers or max(1, round(len(self.blocks) / 3))
        if self.n > len(self.blocks):
            raise LorakitError(f"xgblora: {self.n} layers for each booster, but the adapter is on {len(self.blocks)}")

    def start(self, model, optimizer, total):
        super().start(model, optimizer, total)
        if not self.every and not total:
            raise LorakitError("xgblora: how many steps there will be is not known here; mend: every: (steps of a booster)")
        self._choose()

    def chosen(self, step: int) -> set[str]:
        """The blocks of the booster that begins at this step."""
        return set(some(list(self.blocks), self.n, self.seed, step))

    def _choose(self):
        now = self.chosen(self.begun_at)
        for block, params in self.blocks.items():
            for p in params:
                p.requires_grad_(block in now)

    def due(self, step):
        return step % self.every == 0 if self.every else step in {round(self.total * t / self.boosters) for t in range(1, self.boosters)}

    def on_interval(self, model, optimizer, scheduler, step):
        super().on_interval(model, optimizer, scheduler, step)  # those that train are those that were chosen
        if self.begun_at == step:
            self._choose()

    def close(self, model):
        for params in self.blocks.values():
            for p in params:
                p.requires_grad_(True)
