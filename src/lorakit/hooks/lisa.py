"""LISA: in every period a few blocks train, drawn at random. Pan et al., 2024, arXiv 2403.17919.

    every k steps: n of the L blocks, uniformly, train; the others are frozen; what lies outside of blocks always trains

The paper tunes whole layers: use it with the adapter `full`; with others it chooses which blocks' adapters train. All stay in the
optimiser; a frozen one has no gradient and is skipped, its averages wait. In several processes the data-parallel wrapper must look
for unused parameters, as transformers' Trainer asks it to unless gradient checkpointing is on.
"""

from __future__ import annotations

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.factors import by_block
from lorakit.hooks.surgery import some


@hook("lisa", "LISA", "2403.17919", "n random blocks train in every period")
class LISA(Hook):
    layers: int = 2  # n: blocks that train at a time
    every: int = 20  # k: steps in a period
    seed: int = 0  # of the choice

    place = 40

    def __post_init__(self):
        if self.layers < 1 or self.every < 1:
            raise LorakitError(f"lisa: layers and every must be at least 1, not {self.layers}, {self.every}")

    def setup(self, model):
        self.blocks, _ = by_block(model, "lisa")
        if self.layers > len(self.blocks):
            raise LorakitError(f"lisa: {self.layers} layers are to train at a time, but the adapter is on {len(self.blocks)}")
        self.now = -1

    def before_forward(self, model, step):
        begun = step - step % self.every
        if begun != self.now:
            self.now, chosen = begun, set(some(list(self.blocks), self.layers, self.seed, begun))
            for block, params in self.blocks.items():
                for p in params:
                    p.requires_grad_(block in chosen)

    def close(self, model):
        for params in self.blocks.values():
            for p in params:
                p.requires_grad_(True)
