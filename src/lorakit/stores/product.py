"""The product with a packed matrix, made and used a piece at a time in both directions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorakit.kernels import fused
from lorakit.stores.scheme import Parts, Scheme


class Product(torch.autograd.Function):
    """y = x Mᵀ + b without M whole: (…, m), (n,) -> (…, n). Keeps nothing for the backward pass but the packed parts, which the layer has."""

    @staticmethod
    def forward(ctx, x, bias, scheme, shape, names, a, b, c, d):  # so many parts, as torch.compile counts the arguments
        parts = dict(zip(names, (a, b, c, d), strict=False))
        ctx.packed, ctx.came_as = (scheme, shape, names), x.dtype
        ctx.save_for_backward(*parts.values())
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return times(x.to(dtype), None if bias is None else bias.to(dtype), scheme, shape, parts)

    @staticmethod
    def backward(ctx, g):
        scheme, shape, names = ctx.packed
        parts = dict(zip(names, ctx.saved_tensors, strict=True))
        gx = back(g, scheme, shape, parts).to(ctx.came_as) if ctx.needs_input_grad[0] else None
        gb = g.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return gx, gb, *[None] * 7


def _pieces(scheme: Scheme, shape: tuple[int, int], parts: Parts, x: Tensor) -> list[tuple[int, int]] | None:
    """(first row, last row + 1) of pieces that are whole rows and whole blocks, for a product with x; None where there are no such."""
    n, m = shape
    rows = scheme.chunk(m, parts, x.dtype, x.numel() // x.shape[-1]) // m
    if rows >= n:
        return [(0, n)]
    while rows and rows * m % scheme.step:
        rows -= 1
    return [(a, min(a + rows, n)) for a in range(0, n, rows)] if rows else None


def times(x: Tensor, bias: Tensor | None, scheme: Scheme, shape: tuple[int, int], parts: Parts) -> Tensor:
    """x Mᵀ + b, (…, m) -> (…, n)."""
    if fused.wanted(x) and (y := fused.product(x, bias, scheme.coded(parts, shape), shape)) is not None:
        return y
    if (split := scheme.by_rows(parts, x.dtype)) is not None:
        scale, parts = split
        y = times(x, None, scheme, shape, parts)
        return y.mul_(scale) if bias is None else y.float().mul_(scale).add_(bias).to(x.dtype)
    pieces = _pieces(scheme, shape, parts, x)
    if pieces is None:
        return linear(x, scheme.matrix(parts, *shape, x.dtype), bias)
    m, parts = shape[1], scheme.opened(parts)

    def piece(a: int, b: int) -> tuple[Tensor, Tensor | None]:
        return scheme.numbers(parts, a * m, b * m, shape, x.dtype).view(-1, m), None if bias is None else bias[a:b]

    if len(pieces) == 1 or torch.compiler.is_compiling():
        return torch.cat([linear(x, *piece(a, b)) for a, b in pieces], -1) if len(pieces) > 1 else linear(x, *piece(*pieces[0]))
    flat = x.reshape(-1, m)
    y = flat.new_empty(len(flat), shape[0])
    for a, b in pieces:
        M, c = piece(a, b)
        torch.mm(flat, M.mT, out=y[:, a:b]) if c is None else torch.addmm(c, flat, M.mT, out=y[:, a:b])
    return y.view(*x.shape[:-1], -1)


def back(g: Tensor, scheme: Scheme, shape: tuple[int, int], parts: Parts) -> Tensor:
    """g M, (…, n) -> (…, m)."""
    if fused.wanted(g) and (gx := fused.product(g, None, scheme.coded(parts, shape), shape, back=True)) is not None:
        return gx
    if (split := scheme.by_rows(parts, g.dtype)) is not None:
        scale, parts = split
        return back((g.float() * scale).to(g.dtype), scheme, shape, parts)
    pieces = _pieces(scheme, shape, parts, g)
    if pieces is None:
        return g @ scheme.matrix(parts, *shape, g.dtype)
    m, parts = shape[1], scheme.opened(parts)
    flat = g.reshape(-1, shape[0])
    gx = None
    for a, b in pieces:
        M = scheme.numbers(parts, a * m, b * m, shape, g.dtype).view(-1, m)
        if gx is None:
            gx = flat[:, a:b] @ M
        elif g.dtype.itemsize == 2:  # summed in float32, as within one product
            gx = gx.float().add_(flat[:, a:b] @ M)
        else:
            gx = gx.addmm_(flat[:, a:b], M)
    return gx.to(g.dtype).view(*g.shape[:-1], m)
