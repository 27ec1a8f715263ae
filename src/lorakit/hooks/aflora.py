"""AFLoRA's freezing: the factors stop training one by one, the vectors go on. Liu et al., 2024, arXiv 2403.13269.

    every k steps, of the mean I of |gradient| over them:   Ī := β1 Ī + (1 - β1) I,   Ū := β2 Ū + (1 - β2) |I - Ī|,   s = Ī Ū
    ρ(t) = 1 until ti, (1 - (t - ti) / (T - ti - tf))³ until T - tf, then 0;   a factor whose mean score is below the int(N (1 - ρ))-th
    smallest of all N entries' scores is frozen for good; entries that are frozen already count as the smallest

A frozen factor has no gradient and leaves the optimiser's step, its memory too: no decay and no momentum move it. After T - tf all are
frozen. (The public code freezes the factors of square layers from the start; this does not.) In several processes the data-parallel
wrapper must look for unused parameters, as transformers' Trainer asks it to unless gradient checkpointing is on.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.hooks import surgery
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.components import Averages, cubic, known_total, whole_here
from lorakit.hooks.factors import pairs


@hook("aflora", "AFLoRA's freezing", "2403.13269", "A and B freeze one by one, by their gradients")
class AFLoRA(Hook):
    tinit: int = 0  # ti: steps before the first freezing
    tfinal: int = 0  # tf: steps at the end in which all factors are frozen
    every: int = 10  # k: steps from one freezing to the next
    beta1: float = 0.85  # of the average
    beta2: float = 0.95  # of the deviations' average

    def __post_init__(self):
        if self.tinit < 0 or self.tfinal < 0 or self.every < 1 or not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise LorakitError(f"aflora: tinit and tfinal are at least 0, every at least 1, betas from 0 to below 1, not {self}")

    def setup(self, model):
        self.of = {}
        for p in pairs(model, "aflora"):
            if not any(t.requires_grad for k, t in p.slot.parameters(p.adapter).items() if k not in ("A", "B")):
                raise LorakitError(f"aflora: on {p.path} nothing would train once A and B are frozen; mend: a method with vectors beside them, like aflora")
            self.of |= {f"{p.path} {p.adapter} {k}": t for k, t in (("A", p.A), ("B", p.B)) if t.requires_grad}
        self.averages, self.frozen, self.window, self.seen = Averages(self.beta1, self.beta2), [], {}, 0

    def start(self, model, optimizer, total):
        whole_here(self.of.values(), "aflora")
        self.T = known_total(total, "aflora")
        if not self.tinit < self.T - self.tfinal:
            raise LorakitError(f"aflora: of {self.T} steps tinit {self.tinit} and tfinal {self.tfinal} leave none to freeze in; mend: smaller ones")
        self._freeze(optimizer, self.frozen)

    def _freeze(self, optimizer, keys):
        for k in keys:
            self.of[k].requires_grad_(False)
            self.of[k].grad = None
            surgery.forget(optimizer, [self.of[k]])
            for table in (self.averages.mean, self.averages.spread, self.window):
                table.pop(k, None)

    def training(self, t: int) -> float:
        """ρ: the part of the entries that still trains after t steps."""
        return cubic(t, self.tinit, self.T - self.tfinal)

    @torch.no_grad()
    def before_step(self, model, optimizer, step):
        for k, p in self.of.items():
            if k not in self.frozen:
                now = torch.zeros_like(p) if p.grad is None else p.grad.abs()
                self.window[k] = self.window[k].to(now) + now if k in self.window else now
        self.seen += 1

    @torch.no_grad()
    def after_step(self, model, optimizer, step):
        t = step + 1
        if t % self.every == 0 and self.window:
            self.averages.update({k: v / self.seen for k, v in self.window.items()})
            self.window, self.seen = {}, 0
        now = self._due(t)
        self._freeze(optimizer, now)
        self.frozen += now

    def _due(self, t: int) -> list[str]:
        """What freezes after step t."""
        left = [k for k in self.of if k not in self.frozen]
        if t >= self.T - self.tfinal:
            return left
        if t <= self.tinit or t % self.every or not left:
            return []
        every = torch.cat([self.averages.score(k).flatten().cpu() for k in left])
        whole = sum(p.numel() for p in self.of.values())
        n = int(whole * (1 - self.training(t))) - (whole - every.numel())
        bar = float(every.kthvalue(n).values) if n > 0 else 0.0
        return [k for k in left if float(self.averages.score(k).mean()) < bar]

    def close(self, model):
        for k in self.frozen:
            self.of[k].requires_grad_(True)

    def state_dict(self):
        return {"averages": self.averages.state_dict(), "frozen": list(self.frozen), "window": dict(self.window), "seen": self.seen}

    def load_state_dict(self, state):
        self.averages.load_state_dict(state["averages"])
        self.frozen, self.window, self.seen = list(state["frozen"]), dict(state["window"]), state["seen"]
