"""RoseLoRA: rows of A and columns of B become sparse while they train. Wang et al., 2024, arXiv 2406.10777.

    I := β I + (1 - β) |p · ∂L/∂p| before every step (at first I = |p · ∂L/∂p|);   after it, in each row of A and each column of B:
    the int(n (1 - ρ)) entries lowest in I := 0,   ρ(t) = 1 until t0, ρ_f + (1 - ρ_f) (1 - (t - t0) / (t1 - t0))³ until t1, then ρ_f

No mask is kept: momentum brings entries back and they are zeroed again, the last step included. The public code spares one entry more
in each row and then clamps both factors to ±3e-3 (`clamp`), of which the paper says nothing.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.components import cubic, whole_here
from lorakit.hooks.factors import pairs


@hook("rose_lora", "RoseLoRA", "2406.10777", "the least sensitive entries of each row of A and column of B := 0")
class RoseLoRA(Hook):
    keep: float = 0.05  # ρ_f: part of each row of A and column of B that is left in the end
    t0: int = 3  # steps before pruning begins
    t1: int = 20  # steps after which only ρ_f is left
    beta: float = 0.8  # of the average of sensitivities
    clamp: float = 0.0  # both factors are cut to ± this after every pruning; 0: they are not

    def __post_init__(self):
        if not 0 < self.keep <= 1 or not 0 <= self.t0 < self.t1 or not 0 <= self.beta < 1 or self.clamp < 0:
            raise LorakitError("rose_lora: keep is above 0 and at most 1, t0 at least 0 and below t1, beta from 0 to below 1, clamp at least 0, not "
                               f"{self.keep}, {self.t0}, {self.t1}, {self.beta}, {self.clamp}")

    def setup(self, model):
        self.of = {f"{p.path} {p.adapter} {k}": (t, dim) for p in pairs(model, "rose_lora") for k, t, dim in (("A", p.A, -1), ("B", p.B, -2))
                   if t.requires_grad}
        self.mean: dict[str, torch.Tensor] = {}

    def start(self, model, optimizer, total):
        whole_here((t for t, _ in self.of.values()), "rose_lora")
        if total and total < self.t1:
            raise LorakitError(f"rose_lora: training has {total} steps, so t1 = {self.t1} is never reached; mend: t1: {total}")

    def kept(self, t: int) -> float:
        """ρ after step number t."""
        return self.keep + (1 - self.keep) * cubic(t, self.t0, self.t1)

    @torch.no_grad()
    def before_step(self, model, optimizer, step):
        for k, (t, _) in self.of.items():
            now = torch.zeros_like(t) if t.grad is None else (t * t.grad).abs()
            self.mean[k] = self.beta * self.mean[k].to(now) + (1 - self.beta) * now if k in self.mean else now

    @torch.no_grad()
    def after_step(self, model, optimizer, step):
        for k, (t, dim) in self.of.items():
            if (n := int(t.shape[dim] * (1 - self.kept(step)) + 1e-9)) > 0:
                t.scatter_(dim, self.mean[k].argsort(dim=dim, stable=True).narrow(dim, 0, n), 0.0)
                if self.clamp:
                    t.clamp_(-self.clamp, self.clamp)

    def state_dict(self):
        return {"mean": dict(self.mean)}

    def load_state_dict(self, state):
        self.mean = dict(state["mean"])
