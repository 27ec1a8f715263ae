"""Riemannian preconditioning: each factor's gradient is scaled by the other factor. Zhang, Pilanci, 2024, arXiv 2402.02347.

    g_A := (Bᵀ B + δ I)⁻¹ g_A,   g_B := g_B (A Aᵀ + δ I)⁻¹

With δ = 0 and plain gradient descent the step of B A does not depend on how the product is split (A → c A, B → B / c). It comes after
clipping and before any optimiser. Only where both factors train.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.factors import pairs
from lorakit.hooks.lora_fa import right_inverse


@hook("riemannian", "Riemannian preconditioning", "2402.02347", "g_A := (BᵀB + δI)⁻¹ g_A, g_B := g_B (AAᵀ + δI)⁻¹")
class Riemannian(Hook):
    reg: float = 1e-2  # δ: added to the diagonals

    place = 30

    def __post_init__(self):
        if self.reg <= 0:
            raise LorakitError(f"riemannian: reg must be above 0, since a factor starts at zero, not {self.reg}")

    def setup(self, model):
        self.pairs = pairs(model, "riemannian", both=True)

    @torch.no_grad()
    def before_step(self, model, optimizer, step):
        for p in self.pairs:
            if p.A.grad is not None:
                p.A.grad = right_inverse(p.A.grad.mT, p.B.mT, self.reg).mT.contiguous()
            if p.B.grad is not None:
                p.B.grad = right_inverse(p.B.grad, p.A, self.reg)
