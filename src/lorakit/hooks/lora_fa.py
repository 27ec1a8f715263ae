"""LoRA-FA: A stays as it started, only B trains. Zhang et al., 2023 (corrected gradient: version 2, 2025), arXiv 2308.03303.

    plain:      g_B as it is
    corrected:  g_B := g_B (A Aᵀ + ε I)⁻¹ / s²       so that s g_B A is the projection of the weight's gradient on the rows of A

Frozen A means that only A x (r numbers a token) is kept for the backward pass and not x. Any optimiser then steps with the
corrected gradient; it comes after clipping. On an embedding the roles swap: B, which is random there, stays.
"""

from __future__ import annotations

import torch

from lorakit.hooks import rounds
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.factors import pairs
from lorakit.method import choice


def right_inverse(g: torch.Tensor, M: torch.Tensor, eps: float) -> torch.Tensor:
    """g (M Mᵀ + eps I)⁻¹, in at least float32; M (r, ·), g (·, r)."""
    M, dtype = M.to(torch.promote_types(M.dtype, torch.float32)), g.dtype
    gram = M @ M.mT + eps * torch.eye(M.shape[-2], device=M.device, dtype=M.dtype)
    return torch.linalg.solve(gram, g.to(M.dtype), left=False).to(dtype)


@hook("lora_fa", "LoRA-FA", "2308.03303", "A frozen, g_B := g_B (A Aᵀ + ε I)⁻¹ / s²")
class LoRAFA(Hook):
    mode: str = choice("corrected", ("corrected", "plain"))  # the gradient of B that is closest to full training's, or B's own
    eps: float = 1e-8  # added to the diagonal of A Aᵀ

    place = 30

    def setup(self, model):
        self.pairs = pairs(model, "lora_fa", both=True)
        for p in self.pairs if self.mode == "corrected" else ():
            rounds.lora_like(p.method, "lora_fa (corrected)", p.path, anew=False)
        for p in self.pairs:
            (p.B if p.flipped() else p.A).requires_grad_(False)

    @torch.no_grad()
    def before_step(self, model, optimizer, step):
        for p in self.pairs if self.mode == "corrected" else ():
            if p.flipped() and p.A.grad is not None:
                p.A.grad = right_inverse(p.A.grad.mT, p.B.mT, self.eps).mT.div(p.s**2).contiguous()
            elif p.B.grad is not None:
                p.B.grad = right_inverse(p.B.grad, p.A, self.eps).div(p.s**2)

    def close(self, model):
        for p in self.pairs:
            (p.B if p.flipped() else p.A).requires_grad_(True)
