"""Diff pruning's training: an L0 penalty, then a fixed mask. Guo, Rush, Kim, 2020, arXiv 2012.07463.

    loss + weight · Σ expected number of entries of the gates that are not zero;   after step `fix`: the `share` of all entries of the learnt
    change that is largest in magnitude stays, its gates at 1 and all others at 0 for good, and only the values go on training

Gates have a rate of their own. Where the mask is fixed the change of the kept entries stays what it was, gates included: w takes them in.
"""

from __future__ import annotations

import torch

from lorakit import host
from lorakit.errors import LorakitError
from lorakit.hooks import surgery
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.components import known_total, lowest, whole_here

FIXED = 30.0  # a gate's logit at which it is exactly 1, drawn or not; 0 at minus this


@hook("diff_pruning", "Diff pruning's training", "2012.07463", "loss + weight · E‖gates‖₀, then the largest entries alone")
class DiffPruning(Hook):
    weight: float = 1.25e-7  # of the penalty
    share: float = 0.005  # of all entries that stays
    fix: float = 0.5  # part of the training after which the mask is fixed; 1: never
    lr: float = 0.1  # rate of the gates

    def __post_init__(self):
        if self.weight < 0 or not 0 < self.share <= 1 or not 0 < self.fix <= 1 or self.lr <= 0:
            raise LorakitError("diff_pruning: weight is at least 0, share and fix above 0 and at most 1, lr above 0, not "
                               f"{self.weight}, {self.share}, {self.fix}, {self.lr}")

    def setup(self, model):
        self.of = []
        for slot in host.slots(model).values():
            for a, m in slot.methods.items():
                if a not in slot.tied and {"w", "a"} <= set(m.core.leaves) and hasattr(m.core, "change"):
                    self.of.append((slot, m.core, slot.parameters(a)))
        if not self.of:
            raise LorakitError("diff_pruning: no adapter here has a gate for each entry of its change; mend: the method diff-pruning")
        self.gates, self.fixed = [p[k] for _, _, p in self.of for k in "ag" if k in p], False

    def param_groups(self, model, groups):
        mine, out = {id(p) for p in self.gates}, []
        for g in groups:
            out += [{**g, "params": [p for p in g["params"] if id(p) not in mine]},
                    {**g, "params": [p for p in g["params"] if id(p) in mine], "lr": self.lr, "weight_decay": 0.0}]
        return [g for g in out if g["params"]]

    def start(self, model, optimizer, total):
        whole_here(self.gates, "diff_pruning")
        self.last = int(self.fix * known_total(total, "diff_pruning")) if self.fix < 1 else None
        if self.fixed:
            self._freeze(optimizer)

    def _freeze(self, optimizer):
        for p in self.gates:
            p.requires_grad_(False)
            p.grad = None
        surgery.forget(optimizer, self.gates)

    def extra_loss(self, model, outputs):
        return 0.0 if self.fixed or not self.weight else self.weight * sum(m.penalty(p).to(self.gates[0].device) for _, m, p in self.of)

    @torch.no_grad()
    def after_step(self, model, optimizer, step):
        if self.fixed or step + 1 != self.last:
            return
        change = [m.change(p, False) if p["w"].dim() == 2 else torch.stack([m.change({k: t[n] for k, t in p.items()}, False) for n in range(len(p["w"]))])
                  for _, m, p in self.of]
        n = sum(c.numel() for c in change)
        for (_, _, p), c, gone in zip(self.of, change, lowest([c.abs() for c in change], n - int(self.share * n + 0.5)), strict=True):
            p["w"].copy_(c.masked_fill(gone, 0))
            p["a"].copy_(torch.where(gone, -FIXED, FIXED))
            if "g" in p:
                p["g"].fill_(FIXED)
        self.fixed = True
        self._freeze(optimizer)

    def close(self, model):
        for p in self.gates:
            p.requires_grad_(True)

    def state_dict(self):
        return {"fixed": self.fixed}

    def load_state_dict(self, state):
        self.fixed = state["fixed"]
