"""ReLoRA: merge, restart, go on, so that the sum of low-rank updates has a high rank. Lialin et al., 2023, arXiv 2307.05695.

    every k steps:  W := W + s B A,   A := its random start,   B := 0,   optimiser's memory of A and B pruned
    in the w steps after a restart:  rate := scheduler's rate · j / w,   j = 0, 1, … steps since the restart

The model computes the same before and after a restart. The memory is pruned, not dropped: by default 99 % of it at random (the same
entries of all averages; exact zeros everywhere upset some sharded optimisers), or the smallest entries; its step counter stays. Without
the ramp the loss jumps. The base on disk stays as it is: the adapter is saved as one LoRA whose rank is that of all rounds together.
No restart happens at the last step. Choose a rate about twice that of full training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from lorakit.errors import LorakitError
from lorakit.hooks import rounds, surgery
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.factors import Pair, pairs


class Restarts(Hook, ABC):
    """What ReLoRA, COLA and XGBLoRA have in common: rounds of training, each taken into the base."""

    place = 80
    seed: int
    model = None
    total: int | None = None
    begun_at = 0  # the step at which this round began
    warmup = 0

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether the round ends after so many steps."""

    def forget(self, optimizer, chosen: list[Pair], step: int) -> None:
        """The optimiser's memory of the restarted leaves; a fresh optimiser unless a hook says otherwise."""
        surgery.forget(optimizer, [t for p in chosen for t in (p.A, p.B)])

    def setup(self, model):
        self.model = model
        for p in pairs(model, self.name, both=True):
            rounds.lora_like(p.method, self.name, p.path)
            if any(s.tied.get(p.adapter) is p.slot for s in rounds.host.slots(model).values()):
                raise LorakitError(f"{self.name}: {p.path} shares its adapter with a tied weight, which would have to take it in as well; mend: leave it out")

    def start(self, model, optimizer, total):
        self.total = total

    def on_interval(self, model, optimizer, scheduler, step):
        if step != self.total and self.due(step):
            chosen = pairs(model, self.name)
            rounds.new_round(chosen, self.seed, step)
            self.forget(optimizer, chosen, step)
            self.begun_at = step

    def ramp(self, step: int) -> float:
        """What the rate of step number `step` is multiplied by."""
        return min(1.0, (step - self.begun_at) / self.warmup) if self.begun_at and self.warmup else 1.0

    def before_step(self, model, optimizer, step):
        self.rates = [g["lr"] for g in optimizer.param_groups]
        for g in optimizer.param_groups:
            g["lr"] = g["lr"] * self.ramp(step)

    def after_step(self, model, optimizer, step):
        for g, rate in zip(optimizer.param_groups, self.rates, strict=True):
            g["lr"] = rate

    def state_dict(self):
        return {"begun_at": self.begun_at, "rounds": rounds.state_of(self.model)}

    def load_state_dict(self, state):
        self.begun_at = state["begun_at"]
        rounds.load_state(self.model, state["rounds"], self.name)


@hook("relora", "ReLoRA", "2307.05695", "every k steps: W := W + s B A; A, B start anew")
class ReLoRA(Restarts):
    every: int = 200  # k: optimiser steps in a round
    warmup: int = 10  # w: steps after a restart in which the rate rises from 0 again; 0: none
    prune: str = "random"  # the optimiser's memory of A and B: random entries, the entries smallest in magnitude, or all (zero)
    share: float = 0.99  # of the entries that are zeroed; with prune: zero all are
    seed: int = 0  # of the restarts

    def __post_init__(self):
        if self.every < 1 or self.warmup < 0 or self.warmup >= self.every:
            raise LorakitError(f"relora: a round of {self.every} steps with a ramp of {self.warmup} makes no sense; mend: every of at least 1, warmup below it")
        if self.prune not in surgery.PRUNES or not 0 <= self.share <= 1:
            raise LorakitError(f"relora: prune is one of {', '.join(surgery.PRUNES)} and share from 0 to 1, not {self.prune!r}, {self.share!r}")

    def due(self, step):
        return step % self.every == 0

    def forget(self, optimizer, chosen, step):
        for p in chosen:
            surgery.prune(optimizer, [p.A, p.B], self.share, self.prune, surgery.draw(self.seed, step, f"prune {p.path}"))
