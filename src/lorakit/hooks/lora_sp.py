"""LoRA-SP: a random half of the entries of A and B does not train. Wu et al., 2024, arXiv 2403.08822.

    p := mask ⊙ (p after the step) + (1 - mask) ⊙ p,   mask ~ Bernoulli(1 - frozen)

The update is masked and not only the gradient: momentum and decay would move frozen entries. Granularity and how often the mask is
drawn are not settled by the paper: here entries or whole ranks, anew in every step or once. The mask is drawn from seed and step, so
all processes have the same.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.factors import pairs
from lorakit.hooks.surgery import draw
from lorakit.method import choice


@hook("lora_sp", "LoRA-SP", "2403.08822", "only a random half of A and B is updated")
class LoRASP(Hook):
    frozen: float = 0.5  # share of the entries that stay
    resample: str = choice("step", ("step", "once"))  # a new mask in every step, or the first one throughout
    granularity: str = choice("element", ("element", "rank"))  # single entries, or rows of A and the columns of B that belong to them
    seed: int = 0  # of the masks

    place = 40

    def __post_init__(self):
        if not 0 <= self.frozen < 1:
            raise LorakitError(f"lora_sp: frozen must be at least 0 and below 1, not {self.frozen}")

    def setup(self, model):
        self.pairs = pairs(model, "lora_sp")

    def masks(self, pair, step: int):
        """(mask of A, mask of B), true where the entries train."""
        gen = draw(self.seed, step if self.resample == "step" else 0, f"sp {pair.path}")
        if self.granularity == "rank":
            some = torch.rand(pair.r, generator=gen) >= self.frozen
            return some[:, None].expand(pair.A.shape), some.expand(pair.B.shape)
        return torch.rand(pair.A.shape, generator=gen) >= self.frozen, torch.rand(pair.B.shape, generator=gen) >= self.frozen

    @torch.no_grad()
    def before_step(self, model, optimizer, step):
        self.kept = []
        for pair in self.pairs:
            for p, mask in zip((pair.A, pair.B), self.masks(pair, step), strict=True):
                mask = mask.to(p.device)
                self.kept.append((p, mask, p.detach().clone()))
                if p.grad is not None:
                    p.grad.mul_(mask)

    @torch.no_grad()
    def after_step(self, model, optimizer, step):
        for p, mask, before in self.kept:
            p.copy_(torch.where(mask, p, before))
        self.kept = []
