"""GaLore: whole weights train, the optimiser works in a small subspace of their gradients. Zhao et al., 2024, arXiv 2403.03507.

    every k steps, from the gradient G (o, i):  P = first r left singular vectors (o < i), or right ones (o >= i)
    R = Pᵀ G  (or G P);   W := W + scale · P (the optimiser's step for R)  (or (step) Pᵀ) - rate · decay · W

For the adapter `full`. Any optimiser works on R: it is given a parameter of R's shape, which is zero before every step. Its averages
live in the subspace and are neither reset nor turned when P changes, as in the official code. In several processes the first one's P
holds (singular vectors have no sign). Memory is saved in the optimiser's state, not in the gradients. Where a side is not larger than r
the weight trains as usual.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lorakit import host
from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook


class Projected(Hook, ABC):
    """Weights whose gradients are projected: the optimiser holds a small parameter for each."""

    place = 30
    r: int
    every: int
    scale: float

    def __post_init__(self):
        if self.r < 1 or self.every < 1:
            raise LorakitError(f"{self.name}: r and every must be at least 1, not {self.r}, {self.every}")

    @abstractmethod
    def basis(self, path: str, G: Tensor, step: int) -> Tensor:
        """P with orthonormal or random columns, (side, r)."""

    def changed(self, optimizer, small: nn.Parameter, old: Tensor, new: Tensor, left: bool) -> None:
        """P has become another one."""

    def setup(self, model):
        self.weights = {f"{path} {a}": p["V"] for path, s in host.slots(model).items() for a in s.methods
                        if "V" in (p := s.parameters(a)) and p["V"].requires_grad and p["V"].dim() > 1 and min(p["V"].shape[-2:]) > self.r}
        if not self.weights:
            raise LorakitError(f"{self.name}: nothing here trains whole with both sides larger than r = {self.r}; mend: adapter: full, or a smaller r")
        self.P, self.small, self.decay = {}, {}, {}

    def param_groups(self, model, groups):
        large = {id(W): k for k, W in self.weights.items()}
        out = []
        for g in groups:
            out.append({**g, "params": [p for p in g["params"] if id(p) not in large]})
            mine = [large[id(p)] for p in g["params"] if id(p) in large]
            for k in mine:
                *stack, o, i = self.weights[k].shape
                self.small[k] = nn.Parameter(self.weights[k].new_zeros(*stack, *((self.r, i) if o < i else (o, self.r))))
                self.decay[k] = g.get("weight_decay", 0.0)
            out.append({**g, "params": [self.small[k] for k in mine], "weight_decay": 0.0})
        return [g for g in out if g["params"]]

    @torch.no_grad()
    def before_step(self, model, optimizer, step):
        for k, W in self.weights.items():
            if W.grad is None:
                self.small[k].grad = None
                continue
            left = W.shape[-2] < W.shape[-1]
            if step % self.every == 0 or k not in self.P:
                old, self.P[k] = self.P.get(k), self.basis(k, W.grad.float(), step).to(W)
                if old is not None:
                    self.changed(optimizer, self.small[k], old, self.P[k], left)
            P = self.P[k]
            self.small[k].grad = P.mT @ W.grad if left else W.grad @ P

    @torch.no_grad()
    def after_step(self, model, optimizer, step):
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        for k, W in self.weights.items():
            small = self.small[k]
            if small.grad is not None:
                W.add_(self.P[k] @ small if W.shape[-2] < W.shape[-1] else small @ self.P[k].mT, alpha=self.scale)
                W.mul_(1 - rates[id(small)] * self.decay[k])
                small.zero_()

    def state_dict(self):
        return {"P": {k: P.cpu() for k, P in self.P.items()}}

    def load_state_dict(self, state):
        self.P = {k: P.to(self.weights[k]) for k, P in state["P"].items()}


@hook("galore", "GaLore", "2403.03507", "W := W + scale · P step(Pᵀ G)")
class GaLore(Projected):
    r: int = 128  # dimension of the subspace
    every: int = 200  # k: steps for which a subspace is kept
    scale: float = 0.25  # of the step; with it the README's rate is 0.01

    def basis(self, path, G, step):
        U, _, V = torch.linalg.svd(G, full_matrices=False)
        P = (U[..., :, : self.r] if G.shape[-2] < G.shape[-1] else V[..., : self.r, :].mT).contiguous()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(P, 0)
        return P
