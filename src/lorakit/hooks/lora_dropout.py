"""LoRA Dropout: whole inputs of A and outputs of B are dropped. Lin et al., 2024, arXiv 2404.09610.

    B̂ Â,   Â = A diag(m_A),   B̂ = diag(m_B) B,   m ~ Bernoulli(1 - p)

So an entry of the update is zero with probability 2 p - p². One mask for all rows of a step, never along the rank, no rescaling.
Evaluation and what is saved use all of A and B (the mean of the masked updates would be (1 - p)² of it). Different from
`lora_dropout`, which drops single entries of the input, each token's own.
"""

from __future__ import annotations

from functools import partial

import torch

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.factors import pairs
from lorakit.hooks.surgery import draw


@hook("lora_dropout", "LoRA Dropout", "2404.09610", "diag(m_B) B A diag(m_A)")
class LoRADropout(Hook):
    p: float = 0.1  # share of A's columns and of B's rows that are dropped; about 0.5 from rank 8 on
    seed: int = 0  # of the masks

    place = 40

    def __post_init__(self):
        if not 0 <= self.p < 1:
            raise LorakitError(f"lora_dropout: p must be at least 0 and below 1, not {self.p}")

    def setup(self, model):
        self.pairs, self.masks, self.kept = pairs(model, "lora_dropout"), {}, []
        self.handles = [t.register_hook(partial(self._masked, id(t))) for p in self.pairs for t in (p.A, p.B) if t.requires_grad]

    def _masked(self, which: int, g):
        return g * self.masks[which] if which in self.masks else g

    @torch.no_grad()
    def before_forward(self, model, step):
        for pair in self.pairs:
            gen = draw(self.seed, step, f"dropout {pair.path}")
            for t, shape in ((pair.A, (*pair.A.shape[:-2], 1, pair.A.shape[-1])), (pair.B, (*pair.B.shape[:-1], 1))):
                mask = (torch.rand(shape, generator=gen) >= self.p).to(t)
                self.masks[id(t)] = mask
                self.kept.append((t, t.detach().clone()))
                t.mul_(mask)

    @torch.no_grad()
    def _whole(self):
        for t, before in self.kept:
            t.copy_(before)
        self.kept, self.masks = [], {}

    def before_step(self, model, optimizer, step):
        self._whole()

    def close(self, model):
        self._whole()
        for h in self.handles:
            h.remove()
