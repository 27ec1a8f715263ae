"""Rotations from skew-symmetric matrices, at least in float32, and their blockwise action. b is the size of a block."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def block_of(numbers: int) -> int:
    """The size b of a skew block that b(b-1)/2 numbers fill."""
    return (1 + math.isqrt(1 + 8 * numbers)) // 2


def skew(v: Tensor) -> Tensor:
    """Q (…, b, b) = T - Tᵀ, T with the numbers v (…, b(b-1)/2) above its diagonal, row by row."""
    b = block_of(v.shape[-1])
    row, col = torch.triu_indices(b, b, 1, device=v.device)
    place = torch.zeros(b, b, dtype=torch.long, device=v.device).index_put((row, col), torch.arange(1, len(row) + 1, device=v.device))
    T = torch.cat([torch.zeros_like(v[..., :1]), v], -1)[..., place]
    return T - T.mT


def cayley_slow(Q: Tensor) -> Tensor:
    one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    return torch.linalg.solve(one + Q, one - Q)  # the two commute


class _Cayley(torch.autograd.Function):
    """Keeps R alone: I + R = 2 (I + Q)⁻¹, so that dR = -½ (I + R) dQ (I + R) and the backward pass solves nothing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(Q):
        with torch.autocast(Q.device.type, enabled=False):
            return cayley_slow(Q)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (R,) = ctx.saved_tensors
        with torch.autocast(R.device.type, enabled=False):
            S = (R + torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)).mT
            return S @ g @ S * -0.5


def cayley(Q: Tensor) -> Tensor:
    """(I - Q)(I + Q)⁻¹: orthogonal for any skew Q."""
    return _Cayley.apply(Q)


def cayley_series(Q: Tensor, terms: int) -> Tensor:
    """PEFT's truncated series I + 2Q + 2Q² + … + Qⁿ, n = terms - 1 (for 3 and 4 terms alike: up to Q³).

    It tends to (I + Q)(I - Q)⁻¹, which is the transpose of `cayley(Q)`, and is orthogonal only as far as Q is small.
    """
    with torch.autocast(Q.device.type, enabled=False):
        one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        if terms < 3:
            return (one + 2 * (terms - 1) * Q).expand_as(Q)
        last = max(terms - 1, 3)
        R = 2 * one + Q  # Horner: from the last power outwards
        for _ in range(last - 2):
            R = 2 * one + Q @ R
        return one + Q @ R


def turn(x: Tensor, R: Tensor) -> Tensor:
    """x (…, n b) times the block-diagonal matrix of R (n, b, b); R (1, b, b) serves every block."""
    b = R.shape[-1]
    return torch.einsum("...nb,nbc->...nc", x.unflatten(-1, (-1, b)), R.to(x.dtype).expand(x.shape[-1] // b, b, b)).flatten(-2)
