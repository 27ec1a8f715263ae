"""AdaLoRA's allocator: one budget of rank-one components for the whole model. Zhang et al., 2023, arXiv 2303.10512.

    I = |p · ∂L/∂p|,   Ī := β1 Ī + (1 - β1) I,   Ū := β2 Ū + (1 - β2) |I - Ī| (the new Ī),   s(p) = Ī Ū
    S_k = s(λ_k) + mean_i s(Q_ki) + mean_o s(P_ok),   λ_k := 0 for the b0 - b(t) smallest S of all layers
    b(t) = bT + (b0 - bT) (1 - (t - ti) / (T - tf - ti))³ between ti and T - tf,   loss + w · mean(‖PᵀP - I‖, ‖QQᵀ - I‖)

t counts finished steps, T is the trainer's number of steps. At T - tf the mask is made a last time and stays; before that a λ can come
back. The norms are not squared and means are taken where the paper prints squares and sums, as in both public codes; so is the budget's
formula. The scale keeps the rank of the beginning. Of equal scores the first go, so that the budget is met exactly; scores see the
weights after the step and the gradients before it. The finished adapter is saved with the components that are left; a target of which
none is left keeps all its leaves.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.components import Averages, cubic, far_from_orthonormal, gated, known_total, lowest, products, whole_here


@hook("adalora", "AdaLoRA's allocator", "2303.10512", "λ_k := 0 where sensitivity × uncertainty is lowest of all layers")
class AdaLoRA(Hook):
    target_r: int = 8  # bT: components left in the end, for each matrix on average
    tinit: int = 0  # ti: steps before the first pruning
    tfinal: int = 0  # tf: steps at the end in which the mask stays
    delta_t: int = 1  # steps from one mask to the next
    beta1: float = 0.85  # of the average of sensitivities
    beta2: float = 0.85  # of the average of their deviations
    orth_weight: float = 0.5  # w: of the orthogonality term
    squared: bool = False  # squared norms in that term, as the paper prints them
    total_step: int = 0  # T; 0: the trainer's number of steps

    def __post_init__(self):
        if self.target_r < 0 or self.delta_t < 1 or self.tinit < 0 or self.tfinal < 0 or not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise LorakitError(f"adalora: target_r, tinit and tfinal are at least 0, delta_t at least 1, betas from 0 to below 1, not {self}")

    def setup(self, model):
        self.of, self.averages, self.mask = gated(model, "adalora"), Averages(self.beta1, self.beta2), None
        self.params = {g.key(k): p for g in self.of for k, p in zip(g.names, (g.B, g.gate, g.A), strict=True)}
        self.b0, self.bT = sum(g.gate.numel() for g in self.of), self.target_r * sum(g.many for g in self.of)
        if self.bT > self.b0:
            raise LorakitError(f"adalora: the budget in the end, {self.bT} components, is above that of the beginning, {self.b0}; mend: a lower target_r, "
                               "or an adapter of higher rank (1.5 × target_r is usual)")

    def start(self, model, optimizer, total):
        whole_here(self.params.values(), "adalora")
        self.T = self.total_step or known_total(total, "adalora")
        if total and total < self.T:
            raise LorakitError(f"adalora: total_step is {self.T}, but training has {total} steps, so the budget would not be met; mend: leave total_step out")
        if not self.tinit < self.T - self.tfinal:
            raise LorakitError(f"adalora: of {self.T} steps tinit {self.tinit} and tfinal {self.tfinal} leave none to prune in; mend: smaller ones")

    def budget(self, t: int) -> int:
        """Components that live after t steps."""
        return int(self.bT + (self.b0 - self.bT) * cubic(t, self.tinit, self.T - self.tfinal))

    def extra_loss(self, model, outputs):
        return self.orth_weight * far_from_orthonormal(self.of, self.squared) if self.orth_weight else 0.0

    def scores(self) -> list[torch.Tensor]:
        """S of every component, (matrices, r) for each target."""
        s = self.averages.score
        return [g.flat(s(g.key(E))) + s(g.key(Q)).mean(-1).view(-1, g.r) + s(g.key(P)).mean(-2).view(-1, g.r)
                for g in self.of for P, E, Q in (g.names,)]

    @torch.no_grad()
    def after_step(self, model, optimizer, step):
        t, end = step + 1, self.T - self.tfinal
        if self.mask is None and (t < end or not self.averages.mean):
            self.averages.update(products(self.params))
        if t < end and (t <= self.tinit or t % self.delta_t):
            return
        mask = self.mask or lowest(self.scores(), self.b0 - self.budget(t))
        if t >= end and self.mask is None:
            self.mask, self.averages = mask, Averages(self.beta1, self.beta2)
        for g, m in zip(self.of, mask, strict=True):
            g.flat(g.gate).masked_fill_(m.to(g.gate.device), 0)

    def ranks(self) -> dict[str, int]:
        """Target -> components that live; of a stack those of all its matrices."""
        return {g.path: int((g.gate != 0).sum()) for g in self.of}

    def state_dict(self):
        return {"averages": self.averages.state_dict(), "mask": self.mask}

    def load_state_dict(self, state):
        self.averages.load_state_dict(state["averages"])
        self.mask = state["mask"]
