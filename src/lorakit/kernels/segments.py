"""Thin products for a batch whose rows belong to different adapters: u_n = x_n A_kᵀ B_kᵀ, k = index[n].

Rows of one adapter lie together (training several at once) or each row has its own (serving): the factors are stacked once, the rows sorted into
groups of one size where there are such, else every row fetches its factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

FEW = 32  # tokens of a row up to which fetching its factors costs less than a loop over adapters


def segmented_slow(x: Tensor, index: Tensor, pairs: Sequence[tuple[Tensor, Tensor] | None], out: int) -> Tensor:
    """(n, …, i) -> (n, …, o), row by row; a row of -1, or of no pair, gives zero."""
    u = x.new_zeros(*x.shape[:-1], out)
    for n, k in enumerate(index.tolist()):
        if k >= 0 and pairs[k] is not None:
            B, A = pairs[k]
            u[n] = x[n] @ A.mT @ B.mT
    return u


@dataclass(frozen=True)
class Layout:
    """Which rows have which adapter: `order` sorts the rows that have one by it, `size` of each where all have as many (else 0)."""

    index: Tensor  # (n,), a number into the stacked factors, or their count where there is none
    kinds: tuple[int, ...]  # the adapters that occur, ascending
    order: Tensor | None  # None: they lie sorted already
    size: int
    every: bool  # every row has one


def layout(index: Tensor, there: Sequence[bool], device: torch.device) -> Layout:
    """index: (n,), -1 for none; there: whether adapter k does anything here."""
    at = [k if k >= 0 and there[k] else -1 for k in index.tolist()]
    kinds = tuple(sorted({k for k in at if k >= 0}))
    rows = sorted((n for n, k in enumerate(at) if k >= 0), key=lambda n: (at[n], n))
    counts = {at.count(k) for k in kinds}
    place = {k: n for n, k in enumerate(kinds)} | {-1: len(kinds)}
    straight = rows == list(range(len(at)))
    return Layout(torch.tensor([place[k] for k in at], device=device), kinds, None if straight else torch.tensor(rows, device=device),
                  counts.pop() if len(counts) == 1 else 0, len(rows) == len(at))


def stacked(products: Sequence[tuple[Tensor, Tensor, float]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """s B (k, o, r) and A (k, r, i) of adapters, (B, A, s) each, the lower ranks filled with zeros."""
    r = max(A.shape[0] for _, A, _ in products)
    A = torch.stack([A if A.shape[0] == r else F.pad(A, (0, 0, 0, r - A.shape[0])) for _, A, _ in products])
    B = torch.stack([B if B.shape[1] == r else F.pad(B, (0, r - B.shape[1])) for B, _, _ in products])
    scales = [s for *_, s in products]
    s = scales[0] if len(set(scales)) == 1 else torch.tensor(scales, dtype=B.dtype, device=B.device)[:, None, None]
    return (B if scales[0] == 1.0 and isinstance(s, float) else B * s).to(dtype), A.to(dtype)


def segmented(x: Tensor, at: Layout, B: Tensor, A: Tensor) -> Tensor:
    """u for stacked factors of `at.kinds`: (n, …, i) -> (n, …, o)."""
    flat = x.reshape(len(x), -1, x.shape[-1])  # (n, t, i)
    n, t, _ = flat.shape
    if at.size:
        some = flat if at.order is None else flat[at.order]
        u = torch.bmm(torch.bmm(some.reshape(len(A), -1, some.shape[-1]), A.mT), B.mT).view(len(some), t, -1)
        if at.order is not None:
            u = u.new_zeros(n, t, u.shape[-1]).index_copy(0, at.order, u)
    elif t <= FEW:
        A, B = (torch.cat([M, M.new_zeros(1, *M.shape[1:])])[at.index] if not at.every else M[at.index] for M in (A, B))
        u = torch.bmm(torch.bmm(flat, A.mT), B.mT)
    else:
        u = flat.new_zeros(n, t, B.shape[1])
        for k in range(len(A)):
            rows = (at.index == k).nonzero().squeeze(1)
            u = u.index_copy(0, rows, flat[rows] @ A[k].mT @ B[k].mT)
    return u.view(*x.shape[:-1], -1)
