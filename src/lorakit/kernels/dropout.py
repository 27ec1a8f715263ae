"""Dropout in front of a thin factor, whose mask is not kept for the backward pass but drawn again from its seed.

    h = (m ∘ x) Aᵀ / (1 - p),   m_n = 1 with probability 1 - p

Drawn from 16-bit lanes of one random 64-bit number for four elements: p is rounded to a 65536th, and the scale with it. The seed comes from torch's own
generator, so `torch.manual_seed` and a checkpoint that is computed again give the same mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LANES = 65536


def mask(shape: torch.Size, p: float, seed: int, device: torch.device) -> Tensor:
    """Which elements stay, bool."""
    n = shape.numel()
    g = torch.Generator(device).manual_seed(seed)
    drawn = torch.empty(-(-n // 4), dtype=torch.int64, device=device).random_(-(2**63), None, generator=g).view(torch.int16)[:n]
    return (drawn >= round(p * LANES) - LANES // 2).view(shape)


def dropped_slow(x: Tensor, A: Tensor, p: float, seed: int) -> Tensor:
    kept = mask(x.shape, p, seed, x.device)
    return F.linear(x * kept / (1 - round(p * LANES) / LANES), A)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, p, seed):
        ctx.save_for_backward(x, A)
        ctx.drawn = p, seed
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        kept = mask(x.shape, p, seed, x.device)
        return F.linear(x * kept, A / (1 - round(p * LANES) / LANES)).to(dtype)

    @staticmethod
    def backward(ctx, g):
        x, A = ctx.saved_tensors
        p, seed = ctx.drawn
        kept, scale = mask(x.shape, p, seed, x.device), 1 / (1 - round(p * LANES) / LANES)
        gx = (g @ (A * scale).to(g.dtype)).to(x.dtype) * kept if ctx.needs_input_grad[0] else None
        gA = (g.flatten(0, -2).mT @ ((x * kept).to(g.dtype) * scale).flatten(0, -2)).to(A.dtype) if ctx.needs_input_grad[1] else None
        return gx, gA, None, None


@dataclass(frozen=True)
class Dropout:
    """Dropout with probability p: of an input, or of what a thin factor is multiplied with."""

    p: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p)

    def times(self, x: Tensor, A: Tensor) -> Tensor:
        """drop(x) Aᵀ, (…, i), (r, i) -> (…, r)."""
        if torch.compiler.is_compiling():
            return F.linear(self(x), A)
        return _Dropped.apply(x, A, self.p, 0 if isinstance(x, FakeTensor) else int(torch.randint(2**62, (1,))))
