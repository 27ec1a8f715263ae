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


def _pieces(scheme: Scheme, shape: tuple[int, int], parts: Parts, dtype: torch.dtype) -> list[tuple[int, int]] | None:
    """(first row, last row + 1) of pieces that are whole rows and whole blocks; None where there are no such."""
    n, m = shape
    rows = scheme.chunk(m, parts, dtype) // m
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
        y = times(x, None, scheme, shape, parts).float().mul_(scale)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    pieces = _pieces(scheme, shape, parts, x.dtype)
    if pieces is None:
        return linear(x, scheme.matrix(parts, *shape, x.dtype), bias)
    m, parts = shape[1], scheme.opened(parts)
    some = [linear(x, scheme.numbers(parts, a * m, b * m, shape, x.dtype).view(-1, m), None if bias is None else bias[a:b]) for a, b in pieces]
    return torch.cat(some, -1) if len(some) > 1 else some[0]


def back(g: Tensor, scheme: Scheme, shape: tuple[int, int], parts: Parts) -> Tensor:
    """g M, (…, n) -> (…, m)."""
    if fused.wanted(g) and (gx := fused.product(g, None, scheme.coded(parts, shape), shape, back=True)) is not None:
        return gx
    if (split := scheme.by_rows(parts, g.dtype)) is not None:
        scale, parts = split
        return back((g.float() * scale).to(g.dtype), scheme, shape, parts)
    pieces = _pieces(scheme, shape, parts, g.dtype)
    if pieces is None:
        return g @ scheme.matrix(parts, *shape, g.dtype)
    m, parts = shape[1], scheme.opened(parts)
    flat = g.reshape(-1, shape[0])
    gx = None
    for a, b in pieces:
        M = scheme.numbers(parts, a * m, b * m, shape, g.dtype).view(-1, m)
        gx = flat[:, a:b] @ M if gx is None else gx.addmm_(flat[:, a:b], M)
    return gx.view(*g.shape[:-1], m)
