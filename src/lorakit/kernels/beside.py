"""A frozen product, a thin one beside it and a gain around both, as one step of the backward pass.

    y = g ∘ (x Wᵀ + b + s ((m ∘ x) Aᵀ ∘ e) Bᵀ),   x (…, i), W (o, i), b (o), A (r, i), e (r), B (o, r), g (o), s a number

m is dropout's mask, drawn again from its seed. Kept for the backward pass are x and (m ∘ x) Aᵀ, (…, r); the gain's gradient is made of the result itself,
Σ dy ∘ y / g, which what follows often keeps anyway. Where somebody has changed the result in place since, the sum is computed again. A gain nearer to
zero than 2^-60 acts as that, so that its column can be told from the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lorakit.kernels.dropout import Dropout, masked, strength, without, zeros
from lorakit.kernels.products import Product

LEAST = 2.0**-60


@dataclass(frozen=True)
class Thin:
    """s B diag(e) A, with dropout p of what it acts on from a seed."""

    B: Tensor
    A: Tensor
    e: Tensor | None = None
    s: float = 1.0
    p: float = 0.0
    seed: int = 0


def thin(factors: tuple[Tensor | float, ...], x: Tensor, drop) -> Thin | None:
    """Factors of `LowRank.live` as one, to act on x; None where they are more than B, one diagonal, numbers and A, or the dropout is of no kind known here.

    None too where A is frozen while others train: step by step nothing of x need be kept then.
    """
    *rest, A = factors
    if torch.is_grad_enabled() and not A.requires_grad:
        return None
    B, *diagonals = [M for M in rest if isinstance(M, Tensor)] or [None]
    if B is None or [B.dim(), A.dim()] != [2, 2] or len(diagonals) > 1 or any(M.dim() != 1 for M in diagonals):
        return None
    s = 1.0
    for M in rest:
        s *= 1.0 if isinstance(M, Tensor) else M
    two = Thin(B, A, diagonals[0] if diagonals else None, s)
    if isinstance(drop, Dropout):
        return replace(two, p=drop.p, seed=drop.seed(x))
    return two if drop is None else None


def takes(x: Tensor, W: Tensor | None) -> bool:
    """Whether the sum may be made here: ordinary tensors of one precision, the base frozen, and nobody looks on who would rather see its parts."""
    kinds = (Tensor, torch.nn.Parameter, FakeTensor)
    return (W is not None and not W.requires_grad and type(W) in kinds and type(x) in kinds and x.dtype == W.dtype != torch.float16
            and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active() and not torch.jit.is_tracing()
            and not torch.is_autocast_enabled(x.device.type))


def beside_slow(x: Tensor, W: Tensor, b: Tensor | None, t: Thin, g: Tensor | None = None) -> Tensor:
    A, B = t.A.to(x.dtype), t.B.to(x.dtype)
    h = F.linear(masked(x, t.p, t.seed) if t.p else x, A)
    y = F.linear(x, W, b) + t.s * F.linear(h if t.e is None else h * t.e.to(x.dtype), B)
    return y if g is None else y * g.to(x.dtype)


def _sum(x, W, b, A, e, B, g, s, p, seed) -> tuple[Tensor, Tensor]:
    """The result, and (m ∘ x) Aᵀ (n, r)."""
    flat, y = x.reshape(-1, x.shape[-1]), F.linear(x, W, b)
    u = (without(flat, zeros(flat.numel(), p, seed, x.device)) if p else flat) @ A.to(x.dtype).mT
    y.view(-1, y.shape[-1]).addmm_(u if e is None else u * e.to(x.dtype), B.to(x.dtype).mT, alpha=s * strength(p))
    return (y if g is None else y.mul_(_away(g, g.dtype))), u  # a float32 gain of a bfloat16 result is not rounded first


def _away(g: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(g.abs() < LEAST, LEAST, g).to(dtype)


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b, A, e, B, g, s, p, seed):
        y, u = _sum(x, W, b, A, e, B, g, s, p, seed)
        ctx.numbers, ctx.now = (s, p, seed), None
        if g is not None:
            ctx.now = y.detach()  # counts how often the result has been changed, and holds nothing of it
            ctx.now.data = y.new_empty(0)
            ctx.then = ctx.now._version
        ctx.save_for_backward(x, W, b, A, e, B, g, u, None if g is None else y.data)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, W, b, A, e, B, g, u, y = ctx.saved_tensors
        (s, p, seed), dtype, needs = ctx.numbers, x.dtype, ctx.needs_input_grad
        scale, deep = s * strength(p), torch.is_grad_enabled()
        dy, flat = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        at = zeros(flat.numel(), p, seed, x.device) if p else None
        kept = (without(flat, at) if p else flat) if deep or needs[3] else None
        A_, B_, e_ = A.to(dtype), B.to(dtype), None if e is None else e.to(dtype)
        u = kept @ A_.mT if deep else u
        h = u if e is None else u * e_
        dx = dA = de = dB = dg = None
        if g is not None:
            if needs[6] and not deep and ctx.now._version == ctx.then:
                dg = ((dy * y.view(-1, y.shape[-1])).sum(0) / _away(g, dtype)).to(g.dtype)
            elif needs[6]:
                dg = (dy * torch.addmm(F.linear(flat, W, b), h, B_.mT, alpha=scale)).sum(0).to(g.dtype)
            dy = dy * _away(g, dtype)
        db = dy.sum(0) if needs[2] else None
        dh = dy @ B_ * scale if needs[0] or needs[3] or needs[4] else None
        du = dh if dh is None or e is None else dh * e_
        if needs[0]:
            dx = dy @ W
            dx = dx + without(du @ A_, at) if p else dx.addmm_(du, A_)
            dx = dx.view(x.shape)
        if needs[3]:
            dA = (du.mT @ kept).to(A.dtype)
        if needs[4]:
            de = (dh * u).sum(0).to(e.dtype)
        if needs[5]:
            dB = ((h * scale).mT @ dy).mT.to(B.dtype)
        return dx, None, db, dA, de, dB, dg, None, None, None


def beside(x: Tensor, W: Tensor, b: Tensor | None, t: Thin, g: Tensor | None = None) -> Tensor:
    """y (…, o), where `takes(x, W)`."""
    given = x, W, b, t.A, t.e, t.B, g, t.s, t.p, t.seed
    return _Beside.apply(*given) if torch.is_grad_enabled() else _sum(*given)[0]


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, product, x, W, b, *factors):
        ctx.save_for_backward(x, W, *factors)
        ctx.product = product
        return F.linear(x, product.make(*factors).to(W.dtype).add_(W), b)

    @staticmethod
    def backward(ctx, g):
        x, W, *factors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx = g @ ctx.product.make(*factors).to(W.dtype).add_(W) if needs[1] else None
        g, flat = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        grads = ctx.product.back(g, flat, *factors) if any(needs[4:]) else [None] * len(factors)
        return None, dx, None, g.sum(0) if needs[3] else None, *grads


def merged(x: Tensor, W: Tensor, b: Tensor | None, product: Product, *factors: Tensor) -> Tensor:
    """x (W + M)ᵀ + b, M made of the factors, where `takes(x, W)`: one product for both, of which nothing is kept but x and the factors."""
    return _Merged.apply(product, x, W, b, *factors)
