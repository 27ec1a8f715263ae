"""Sums of random vectors that are never stored: entries come from a hash of counters, the same on every device.

All arithmetic is on integers below 2^63, so nothing overflows and nothing depends on the device, on compilation or on vmap.
"""

from __future__ import annotations

import torch
from torch import Tensor

AT_ONCE = 1 << 22  # entries of bases that exist at a time
MASK = (1 << 32) - 1


def scramble(x: Tensor) -> Tensor:
    """A permutation of the 32-bit integers that looks random (two rounds of xor-shift and multiply), on int64."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & MASK
    return x ^ (x >> 15)


def bases(seed: Tensor, which: int, first: int, last: int, n: int, dtype: torch.dtype) -> Tensor:
    """Basis vectors first … last - 1 of length n, (last - first, n), uniform in (-1, 1): odd multiples of 2^-23, exact in float32.

    seed: three digits below 256, in any dtype. which: bases of different use are different.
    """
    weights = torch.tensor([1, 256, 65536], device=seed.device)
    key = scramble((seed.round().long() * weights).sum(-1) + (which << 24))
    keys = scramble(key ^ scramble(torch.arange(first, last, device=seed.device)))
    entries = scramble(torch.arange(n, device=seed.device))
    bits = scramble(keys[:, None] ^ entries) >> 9
    return (2 * bits + 1 - (1 << 23)).to(dtype) * 2.0**-23


def parts(count: int, n: int) -> list[tuple[int, int]]:
    step = max(1, AT_ONCE // n)
    return [(k, min(k + step, count)) for k in range(0, count, step)]


class Combine(torch.autograd.Function):
    """sum_j c_j (basis j); the gradient of c_j is <gradient, basis j>. The bases are made again for it, some at a time."""

    generate_vmap_rule = True

    @staticmethod
    def forward(c, seed, which, n):
        out = c.new_zeros(n)
        for a, b in parts(c.shape[0], n):
            out = out + c[a:b] @ bases(seed, which, a, b, n, c.dtype)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        c, seed, ctx.which, ctx.n = inputs
        ctx.count = c.shape[0]
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx, grad):
        (seed,) = ctx.saved_tensors
        g = [bases(seed, ctx.which, a, b, ctx.n, grad.dtype) @ grad for a, b in parts(ctx.count, ctx.n)]
        return torch.cat(g), None, None, None


def combine(c: Tensor, seed: Tensor, which: int, n: int) -> Tensor:
    """sum_j c_j (basis j), (n,), for coefficients c (count)."""
    return Combine.apply(c, seed, which, n)
