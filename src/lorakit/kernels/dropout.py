"""Dropout in front of a thin factor, whose mask is not kept for the backward pass but drawn again from its seed.

    h = (m ∘ x) Aᵀ / (1 - p),   m_n = 1 with probability 1 - p

What is drawn are the places of the zeros alone: the gaps between them are geometric, ceil(log u / log(1 - p)), which makes every element independent of
the others. The seed comes from torch's own generator, so `torch.manual_seed` and a checkpoint that is computed again give the same mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def zeros(n: int, p: float, seed: int, device: torch.device) -> Tensor:
    """Which of n elements are dropped, ascending; n itself, as often as it takes, stands for none. Its length depends on n and p alone."""
    if p >= 1:
        return torch.arange(n, device=device)
    many = math.ceil(n * p + 8 * math.sqrt(n * p)) + 16  # that so many gaps end before n has a chance of less than 1e-14
    u = 1 - torch.rand(many, generator=torch.Generator(device).manual_seed(seed), device=device)
    return (u.log_() / math.log1p(-p)).floor_().add_(1).clamp_(max=n + 1).cumsum(0, dtype=torch.int64).sub_(1).clamp_(max=n)


def without(x: Tensor, at: Tensor) -> Tensor:
    """x with zeros at these places of its elements, which are counted row by row."""
    return F.pad(x.reshape(-1), (0, 1)).index_fill_(0, at, 0)[:-1].view(x.shape)


def strength(p: float) -> float:
    """What the elements that stay are multiplied with."""
    return 1 / (1 - p) if p < 1 else 0.0


def masked(x: Tensor, p: float, seed: int) -> Tensor:
    """m ∘ x / (1 - p), the same m at every call; its own transpose."""
    return without(x, zeros(x.numel(), p, seed, x.device)) * strength(p)


def dropped_slow(x: Tensor, A: Tensor, p: float, seed: int) -> Tensor:
    return F.linear(masked(x, p, seed), A)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, p, seed):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, A)
        ctx.drawn, ctx.came_as = (p, seed), (x.shape, x.dtype)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return F.linear(without(x, zeros(x.numel(), p, seed, x.device)), A * strength(p)).to(dtype)

    @staticmethod
    def backward(ctx, g):
        x, A = ctx.saved_tensors
        (p, seed), (shape, dtype) = ctx.drawn, ctx.came_as
        at, scale = zeros(shape.numel(), p, seed, g.device), strength(p)
        gx = without((g @ (A * scale).to(g.dtype)).to(dtype), at) if ctx.needs_input_grad[0] else None
        gA = (g.flatten(0, -2).mT @ (without(x, at).to(g.dtype) * scale).flatten(0, -2)).to(A.dtype) if ctx.needs_input_grad[1] else None
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
        return _Dropped.apply(x, A, self.p, self.seed(x))

    def drawn(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """This dropout of tensors of x's shape with one mask, which is drawn now and kept nowhere."""
        return partial(masked, p=self.p, seed=self.seed(x))

    def seed(self, x: Tensor) -> int:
        return 0 if isinstance(x, FakeTensor) else int(torch.randint(2**62, (1,)))


def steady(drop: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """A dropout, or what stands for none, of tensors of x's shape that does the same at every call."""
    return drop.drawn(x) if isinstance(drop, Dropout) else drop
