"""SoRA's proximal step: gates shrink towards zero, and those that stay there are gone. Ding et al., 2023, arXiv 2311.11696.

    g := sign(g) max(|g| - ξ, 0) after every step,   loss + l1 · Σ|g| / number of gates

ξ is not multiplied by the rate, as in the public code (the paper writes rate · λ). That code's own order of operations also zeroes what
it has just shrunk below ξ, so that its dead zone is 2ξ: `mode: official`. With `levels` ξ rises in equal parts of the training from 0 to
`xi`. Gates have a group of their own in the optimiser, without decay; a closed gate has a gradient and averages, and can open again.
The finished adapter is saved as a LoRA without the closed components.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.components import gated, known_total
from lorakit.method import choice


@hook("sora", "SoRA's proximal step", "2311.11696", "g := sign(g) max(|g| - ξ, 0)")
class SoRA(Hook):
    xi: float = 1e-3  # ξ: what every gate loses in a step
    l1: float = 0.0  # weight of the gates' mean absolute value in the loss; the public code has 1e-3 to 10
    mode: str = choice("soft", ("soft", "official"))  # the true soft threshold, or the public code's
    levels: int = 1  # values that ξ takes, from 0 to xi, each for an equal part of the training; 1: xi throughout
    lr: float = 0.0  # rate of the gates; 0: that of the rest

    def __post_init__(self):
        if self.xi < 0 or self.l1 < 0 or self.levels < 1 or self.lr < 0:
            raise LorakitError(f"sora: xi, l1 and lr are at least 0, levels at least 1, not {self.xi}, {self.l1}, {self.lr}, {self.levels}")

    def setup(self, model):
        self.of = gated(model, "sora", all_train=False)

    def param_groups(self, model, groups):
        gates, out = {id(g.gate) for g in self.of}, []
        for group in groups:
            mine = [p for p in group["params"] if id(p) in gates]
            out.append({**group, "params": [p for p in group["params"] if id(p) not in gates]})
            out.append({**group, "params": mine, "weight_decay": 0.0} | ({"lr": self.lr} if self.lr else {}))
        return [g for g in out if g["params"]]

    def start(self, model, optimizer, total):
        self.total = known_total(total, "sora") if self.levels > 1 else total

    def threshold(self, step: int) -> float:
        """ξ at this step."""
        return self.xi if self.levels == 1 else self.xi * min(step * self.levels // self.total, self.levels - 1) / (self.levels - 1)

    def extra_loss(self, model, outputs):
        if not self.l1:
            return 0.0
        n = sum(g.gate.numel() for g in self.of)
        return self.l1 * sum(g.gate.abs().sum().to(self.of[0].gate.device) for g in self.of) / n

    @torch.no_grad()
    def after_step(self, model, optimizer, step):
        xi = self.threshold(step)
        for g in self.of:
            size = (g.gate.abs() - xi).clamp(min=0)
            if self.mode == "official":
                size = size.where(size >= xi, 0)
            g.gate.copy_(g.gate.sign() * size)

    def ranks(self) -> dict[str, int]:
        """Target -> components that live."""
        return {g.path: int((g.gate != 0).sum()) for g in self.of}
