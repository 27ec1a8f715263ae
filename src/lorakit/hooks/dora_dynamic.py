"""DoRA, dynamic rank distribution (not the weight-decomposed DoRA): components are cut by their part of the update. Mao et al., 2024, arXiv 2405.17357.

    s_k = |c_k| ‖b_k‖ ‖a_k‖ / (‖B diag(c) A‖ + 1e-8),   s̄ := β s̄ + (1 - β) s after every step
    from the first `warmup` of the T steps to the last `rest` of them, every k steps:
    c := 0 for the int((b0 - bT) (τ / τ_max)³) smallest s̄ of all layers;   the last mask stays
    until then: loss + w · mean over all components of (Var(a_k) + Var(b_k)) / 2

τ counts the steps since the warm-up. A component that was cut may come back before the last mask. Of equal scores the first go; at a
rate of 0 nothing is cut (the public code cuts one). The scale keeps the rank of the beginning, about 1.5 times target_r.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.components import gated, known_total, lowest, whole_here


@hook("dora_dynamic", "DoRA, dynamic rank distribution", "2405.17357", "c_k := 0 where ‖c_k b_k a_k‖ / ‖B diag(c) A‖ is lowest of all layers")
class DoRADynamic(Hook):
    target_r: int = 8  # components left in the end, for each matrix on average
    warmup: float = 0.15  # part of the training before the first pruning
    rest: float = 0.5  # part of the training, its end, in which the mask stays
    every: int = 100  # steps from one pruning to the next
    beta: float = 0.9  # of the scores' average
    weight: float = 0.1  # w: of the variance term

    def __post_init__(self):
        if self.target_r < 0 or self.warmup < 0 or self.rest < 0 or self.warmup + self.rest >= 1 or self.every < 1 or not 0 <= self.beta < 1:
            raise LorakitError(f"dora_dynamic: warmup and rest are parts of the training, together below 1, every at least 1, beta below 1, not {self}")

    def setup(self, model):
        self.of, self.mean, self.mask = gated(model, "dora_dynamic"), {}, None
        self.b0, self.bT = sum(g.gate.numel() for g in self.of), self.target_r * sum(g.many for g in self.of)
        if self.bT > self.b0:
            raise LorakitError(f"dora_dynamic: the budget in the end, {self.bT} components, is above that of the beginning, {self.b0}; mend: a lower target_r")

    def start(self, model, optimizer, total):
        whole_here((g.gate for g in self.of), "dora_dynamic")
        self.T = known_total(total, "dora_dynamic")
        self.longest = int(self.T * (1 - self.warmup - self.rest))

    def extra_loss(self, model, outputs):
        if self.mask is not None or not self.weight:
            return 0.0
        return self.weight * sum((g.A.var(-1).sum() + g.B.var(-2).sum()).to(self.of[0].A.device) for g in self.of) / (2 * self.b0)

    def score(self, g) -> torch.Tensor:
        """s of every component, (matrices, r)."""
        c, A, B = g.flat(g.gate), g.A.view(-1, *g.A.shape[-2:]), g.B.view(-1, *g.B.shape[-2:])
        whole = ((B.mT @ B) * (A @ A.mT) * c[:, :, None] * c[:, None, :]).sum((1, 2)).clamp(min=0).sqrt()  # norm of the product, from r x r matrices
        return c.abs() * B.norm(dim=1) * A.norm(dim=2) / (whole[:, None] + 1e-8)

    @torch.no_grad()
    def after_step(self, model, optimizer, step):
        at = int(step + 1 - self.warmup * self.T)
        if self.mask is None:
            for g in self.of:
                k, s = g.key("score"), self.score(g)
                self.mean[k] = (self.mean[k].to(s) if k in self.mean else torch.zeros_like(s)) * self.beta + s * (1 - self.beta)
            if step + 1 < self.warmup * self.T or (at % self.every and at < self.longest):
                return
            share = min(at / self.longest, 1.0) if self.longest else 1.0
            mask = lowest([self.mean[g.key("score")] for g in self.of], int((self.b0 - self.bT) * share ** 3))
            if at >= self.longest:
                self.mask, self.mean = mask, {}
        else:
            mask = self.mask
        for g, m in zip(self.of, mask, strict=True):
            g.flat(g.gate).masked_fill_(m.to(g.gate.device), 0)

    def ranks(self) -> dict[str, int]:
        """Target -> components that live; of a stack those of all its matrices."""
        return {g.path: int((g.gate != 0).sum()) for g in self.of}

    def state_dict(self):
        return {"mean": dict(self.mean), "mask": self.mask}

    def load_state_dict(self, state):
        self.mean, self.mask = dict(state["mean"]), state["mask"]
