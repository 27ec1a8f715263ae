"""Two levels: factors train on one part of the rows, their gates on the other, through one step of the factors (DARTS, arXiv 1806.09055).

    θ := a step on C(V', λ(θ); D2) + γ2 R2(λ),   V' = V - η ∇_V L1(V, λ; D1)
    dC/dλ = ∂C/∂λ - η ∂²L1/∂λ∂V v,   v = ∂C/∂V',   the product as (∂L1/∂λ at V + ε v  -  at V - ε v) / 2ε,   ε = epsilon / ‖v‖

A step of training is one of the lower level, and V' is where plain gradient descent would end it: of the gradient as it is after clipping. θ
moves in the same optimiser step; where the upper level takes more steps in a turn, those before move θ alone, and ∇_V L1 is made anew, unclipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook
from lorakit.hooks.components import gated, whole_here

SHAPES: dict[str, tuple[Callable, Callable]] = {  # θ -> λ and back, (matrices, r)
    "softmax": (lambda t: t.softmax(-1), lambda lam: lam.clamp_min(1e-12).log()),
    "real": (lambda t: t * 1, lambda lam: lam),
    "binary": (torch.sigmoid, lambda lam: lam.logit(1e-6)),
}


class TwoLevels(Hook):
    """What BiLoRA and AutoLoRA have in common: gates λ(θ) that train on rows of their own, through one step of the factors."""

    trains_in_parallel = False
    shape = "softmax"
    weight2 = 0.0  # γ2
    adam: dict[str, tuple[float, float]] = {}  # what the optimiser is told of θ beside its rate
    lower: int
    upper: int
    lr: float
    first_order: bool
    epsilon: float

    def __post_init__(self):
        if not 0 < self.held < 1 or self.lower < 1 or self.upper < 1 or self.lr < 0 or self.epsilon <= 0:
            raise LorakitError(f"{self.name}: held is above 0 and below 1, lower and upper at least 1, lr at least 0, epsilon above 0, not {self}")

    @torch.no_grad()
    def setup(self, model):
        self.of, self.theta, self.seen = gated(model, self.name), [], 0
        lam, theta = SHAPES[self.shape]
        for g in self.of:
            now = g.flat(g.gate)
            begins = self.shape != "real" and not (now.any() and g.A.any() and g.B.any())
            if begins:
                (g.B if g.A.any() else g.A).zero_()
                now.copy_(lam(torch.zeros_like(now)))
            self.theta.append(nn.Parameter(torch.zeros_like(now) if begins else theta(now).clone()))
            if not torch.allclose(lam(self.theta[-1]), now, atol=1e-4):
                raise LorakitError(f"{self.name}: {g.path} has trained, and its gates are no {self.shape} of anything; mend: start anew")
        for g in self.of:
            g.gate.requires_grad_(False)

    def param_groups(self, model, groups):
        return [*groups, {"params": self.theta, "lr": self.lr or groups[0]["lr"], "weight_decay": 0.0, **self.adam}]

    def start(self, model, optimizer, total):
        whole_here((t for g in self.of for t in (g.A, g.B, g.gate)), self.name)

    def before_step(self, model, optimizer, step):
        if (step + 1) % self.lower:
            return
        V, rates = zip(*((p, g["lr"]) for g in optimizer.param_groups for p in g["params"] if p.grad is not None), strict=True)
        begun = grads = [p.grad for p in V]
        for k in range(self.upper):
            if k:  # a step of θ alone, and what V would do at the new λ
                for p in V:
                    p.grad = None
                optimizer.step()
                self.after_step(model, optimizer, step)
                grads = self._grads(self._now(), V)
            changes = self.hypergradient(V, [r * g for r, g in zip(rates, grads, strict=True)], rates)
            for t, g, change in zip(self.theta, self.of, changes, strict=True):
                t.grad = self._through(t, g.flat(change).to(t), step)
        for p, g in zip(V, begun, strict=True):
            p.grad = g

    def _now(self) -> list[Callable[[], Tensor]]:
        if not self.losses.now:
            raise LorakitError(f"{self.name}: it needs this step's loss once more; mend: step.loss(batch).backward() in the loop, or first_order: true")
        return self.losses.now

    def _grads(self, losses: Sequence[Callable[[], Tensor]], params: Sequence[Tensor]) -> list[Tensor]:
        """Of the sum of these losses, with the gates among what has a gradient; one graph at a time."""
        out = [torch.zeros_like(p) for p in params]
        for g in self.of:
            g.gate.requires_grad_(True)
        with torch.enable_grad():
            for loss in losses:
                for total, d in zip(out, torch.autograd.grad(loss(), params, allow_unused=True), strict=True):
                    total += 0 if d is None else d
        for g in self.of:
            g.gate.requires_grad_(False)
        return out

    @torch.no_grad()
    def hypergradient(self, V: Sequence[Tensor], steps: Sequence[Tensor], rates: Sequence[float]) -> list[Tensor]:
        """dC/dλ of each target on the next batch of D2, with V' = V - steps."""
        gates, kept = [g.gate for g in self.of], [p.clone() for p in V]

        def at(change: Sequence[Tensor], times: float) -> None:
            for p, begun, d in zip(V, kept, change, strict=True):
                p.copy_(begun + times * d)

        try:
            at(steps, -1.0)
            found = self._grads([lambda: self.losses.apart(self.seen)], [*gates, *V])
            out, v = found[: len(gates)], [r * d for r, d in zip(rates, found[len(gates) :], strict=True)]  # η v: groups may have rates of their own
            size = float(torch.stack([d.norm().to(v[0].device) for d in v]).norm())
            if not self.first_order and size:
                at(v, self.epsilon / size)
                up = self._grads(self._now(), gates)
                at(v, -self.epsilon / size)
                out = [d - (a - b) * (size / (2 * self.epsilon)) for d, a, b in zip(out, up, self._grads(self._now(), gates), strict=True)]
        finally:
            for p, begun in zip(V, kept, strict=True):
                p.copy_(begun)
        self.seen += 1
        return out

    def _through(self, theta: nn.Parameter, change: Tensor, step: int) -> Tensor:
        """dC/dθ of one target from its dC/dλ, with the upper level's own term."""
        with torch.enable_grad():
            lam = SHAPES[self.shape][0](theta)
            value = (lam * change).sum()
            if self.weight2:
                entropy = -(torch.xlogy(lam, lam) + torch.xlogy(1 - lam, 1 - lam)).sum() / sum(t.numel() for t in self.theta)
                value = value + self.weight2 * min(1.0, (step + 1) / self.total) * entropy
            return torch.autograd.grad(value, theta)[0]

    @torch.no_grad()
    def after_step(self, model, optimizer, step):
        for g, t in zip(self.of, self.theta, strict=True):
            t.grad = None
            g.flat(g.gate).copy_(SHAPES[self.shape][0](t))

    def close(self, model):
        for g in self.of:
            g.gate.requires_grad_(True)

    def state_dict(self):
        return {"theta": {g.key("theta"): t.detach() for g, t in zip(self.of, self.theta, strict=True)}, "seen": self.seen}

    @torch.no_grad()
    def load_state_dict(self, state):
        for g, t in zip(self.of, self.theta, strict=True):
            t.copy_(state["theta"][g.key("theta")])
        self.seen = state["seen"]
