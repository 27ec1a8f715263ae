"""Matrices that are products of small factors, made again in the backward pass instead of being kept for it.

    made(product, *factors)            M (o, i), of which nothing is kept but the factors
    through(product, x, *factors)      drop(x) Mᵀ for x (…, i), of which nothing is kept but x and the factors

A product says how M is made, which is the slow definition and what a compiler traces, and how the gradient of M is pulled back to the factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.kernels.dropout import steady


class Product(NamedTuple):
    make: Callable[..., Tensor]  # factors -> M
    pull: Callable[..., tuple[Tensor, ...]]  # gradient of M, factors -> their gradients
    thin: Callable[..., tuple[Tensor, ...]] | None = None  # g (t, o), x (t, i), factors -> pull(gᵀ x, factors) by a way that does not form gᵀ x

    def back(self, g: Tensor, x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        """The factors' gradients where g (t, o) comes back from x (t, i) Mᵀ."""
        return self.thin(g, x, *factors) if self.thin else self.pull((g.mT @ x).to(factors[0].dtype), *factors)


def _hadamard(a: Tensor, c: Tensor, b: Tensor, d: Tensor) -> Tensor:
    return (a @ b) * (c @ d)


def _hadamard_pull(g: Tensor, a: Tensor, c: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    one, two = g * (c @ d), g * (a @ b)
    return one @ b.mT, two @ d.mT, a.mT @ one, c.mT @ two


def _rows(a: Tensor, c: Tensor) -> Tensor:
    return (a[:, :, None] * c[:, None]).flatten(1)


def _rows_pull(g: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    g = g.unflatten(1, (a.shape[1], -1))
    return (g @ c[:, :, None]).squeeze(2), (a[:, None] @ g).squeeze(1)


def _columns(b: Tensor, d: Tensor) -> Tensor:
    return (b[:, None] * d).flatten(0, 1)


def _columns_pull(g: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    g = g.unflatten(0, (len(b), -1))
    return (g * d).sum(1), (g * b[:, None]).sum(0)


hadamard = Product(_hadamard, _hadamard_pull)  # (a b) ∘ (c d), (o, i), of a, c (o, r) and b, d (r, i); it is rows of a, c times columns of b, d
rows = Product(_rows, _rows_pull)  # the Kronecker product of each row of a (o, r) with that of c (o, s): (o, r s)
columns = Product(_columns, _columns_pull)  # the Kronecker product of each column of b (r, i) with that of d (s, i): (r s, i)


class _Made(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(product, *factors):
        return product.make(*factors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.product, *factors = inputs
        ctx.save_for_backward(*factors)

    @staticmethod
    def backward(ctx, g):
        return None, *ctx.product.pull(g, *ctx.saved_tensors)


class _Through(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(product, mask, x, *factors):
        return F.linear(mask(x), product.make(*factors).to(x.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.product, ctx.mask, x, *factors = inputs
        ctx.save_for_backward(x, *factors)

    @staticmethod
    def backward(ctx, g):
        x, *factors = ctx.saved_tensors
        gx = ctx.mask(g @ ctx.product.make(*factors).to(g.dtype)).to(x.dtype) if ctx.needs_input_grad[2] else None
        if not any(ctx.needs_input_grad[3:]):
            return None, None, gx, *(None for _ in factors)
        flat = ctx.mask(x).to(g.dtype).reshape(-1, x.shape[-1])
        return None, None, gx, *ctx.product.back(g.reshape(-1, g.shape[-1]), flat, *factors)


def made(product: Product, *factors: Tensor) -> Tensor:
    return product.make(*factors) if torch.compiler.is_compiling() else _Made.apply(product, *factors)


def through(product: Product, x: Tensor, *factors: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
    if torch.compiler.is_compiling():
        return F.linear(drop(x), product.make(*factors).to(x.dtype))
    return _Through.apply(product, steady(drop, x), x, *factors)


def cored(t: Tensor, b: Tensor) -> Tensor:
    """A convolution's core t (r, s p), p pixels, and its channels b (s, c) as one factor (r, c p): sum_j t[·, j, ·] b[j, ·]."""
    return torch.einsum("ijp,jc->icp", t.unflatten(1, (len(b), -1)), b).flatten(1)
