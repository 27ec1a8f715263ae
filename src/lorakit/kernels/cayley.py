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
    T = v.new_zeros(*v.shape[:-1], b, b)
    T[..., row, col] = v
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


def _plus(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """A + B C, (…, b, b), in one go where they are one stack of matrices."""
    return torch.baddbmm(A, B, C) if B.dim() == 3 else A + B @ C


def _sums(terms: int) -> int:
    """How many P_k a series of at least 3 terms has."""
    return max(terms - 1, 3) - 1


def _horner(Q: Tensor, many: int) -> list[Tensor]:
    """P_1 = 2I + Q and P_k = 2I + Q P_(k-1), of which the last makes the series I + Q P."""
    two = 2 * torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    out = [two + Q]
    for _ in range(many - 1):
        out.append(_plus(two, Q, out[-1]))
    return out


def cayley_series(Q: Tensor, terms: int) -> Tensor:
    """PEFT's truncated series I + 2Q + 2Q² + … + Qⁿ, n = terms - 1 (for 3 and 4 terms alike: up to Q³).

    It tends to (I + Q)(I - Q)⁻¹, which is the transpose of `cayley(Q)`, and is orthogonal only as far as Q is small.
    """
    with torch.autocast(Q.device.type, enabled=False):
        one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        if terms < 3:
            return (one + 2 * (terms - 1) * Q).expand_as(Q)
        return _plus(one, Q, _horner(Q, _sums(terms))[-1])


class _Series(torch.autograd.Function):
    """Keeps v, and what costs more to make again than to read: Q and the sums P_3, P_4, …, small matrices beside the activations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v, terms):
        Q = skew(v)
        P = _horner(Q, _sums(terms))
        return _plus(torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device), Q, P[-1]), Q, *P[2:]

    @staticmethod
    def setup_context(ctx, inputs, output):
        v, ctx.terms = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(v, *output[1:])

    @staticmethod
    def backward(ctx, g, *_):
        v, Q, *later = ctx.saved_tensors
        with torch.autocast(v.device.type, enabled=False):
            if torch.is_grad_enabled():
                Q = skew(v)
                P = _horner(Q, _sums(ctx.terms))
            else:
                P = [*_horner(Q, 2), *later]
            gQ, g = g @ P[-1].mT, Q.mT @ g
            for one in reversed(P[:-1]):
                gQ, g = _plus(gQ, g, one.mT), Q.mT @ g
            gQ = gQ + g
            row, col = torch.triu_indices(Q.shape[-1], Q.shape[-1], 1, device=v.device)
            return (gQ - gQ.mT)[..., row, col], None


def series_of(v: Tensor, terms: int) -> Tensor:
    """`cayley_series(skew(v), terms)` of a v that trains."""
    with torch.autocast(v.device.type, enabled=False):
        return cayley_series(skew(v), terms) if terms < 3 or torch.compiler.is_compiling() else _Series.apply(v, terms)[0]


def turn_slow(x: Tensor, R: Tensor) -> Tensor:
    b = R.shape[-1]
    return torch.einsum("...nb,nbc->...nc", x.unflatten(-1, (-1, b)), R.to(x.dtype).expand(x.shape[-1] // b, b, b)).flatten(-2)


def _blocks(x: Tensor, b: int) -> Tensor:
    """(…, n b) -> (n, t, b)."""
    return x.reshape(-1, x.shape[-1] // b, b).transpose(0, 1)


def _turned(x: Tensor, R: Tensor) -> Tensor:
    return (_blocks(x, R.shape[-1]) @ R.to(x.dtype)).transpose(0, 1).reshape(x.shape)


class _Turn(torch.autograd.Function):
    """Keeps x and R, and reads blocks with gaps between their rows: one batched product each, which costs less than laying them side by side."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, R):
        return _turned(x, R)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, R = ctx.saved_tensors
        b, gR = R.shape[-1], None
        if ctx.needs_input_grad[1]:
            gR = _blocks(x, b).to(g.dtype).mT @ _blocks(g, b)
            gR = (gR.sum(0, keepdim=True) if len(R) == 1 else gR).to(R.dtype)
        return _turned(g, R.mT).to(x.dtype) if ctx.needs_input_grad[0] else None, gR


def turn(x: Tensor, R: Tensor) -> Tensor:
    """x (…, n b) times the block-diagonal matrix of R (n, b, b); R (1, b, b) serves every block."""
    return turn_slow(x, R) if torch.compiler.is_compiling() else _Turn.apply(x, R)
