"""Where an elementwise rule works: coordinates of the task vectors of one target, and the way back.

    dense   τ_t = ΔW_t (o, i)
    knots   [ΔW_1 … ΔW_n] = U diag(σ) [V_1 … V_n],  Z_t = diag(σ) V_t (k, i),  back: ΔW = U Z.   KnOTS, arXiv 2410.19735
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lorakit.merges.base import Vector

Back = Callable[[Tensor], dict[str, Any]]  # the merged coordinates -> fields of a Vector
SMALLEST = 1e-6  # singular values below this part of the largest are rounding


def dense(vectors: Sequence[Vector]) -> tuple[list[Tensor], Back]:
    return [v.dense() for v in vectors], lambda t: {"matrix": t}


def knots(vectors: Sequence[Vector]) -> tuple[list[Tensor], Back]:
    """k is at most the sum of the ranks: QR of the stacked first factors, then a singular value decomposition of that size."""
    if all(v.factors is not None for v in vectors):
        Q, R = torch.linalg.qr(torch.cat([v.factors[0].double() for v in vectors], -1))
        ranks = [v.rank for v in vectors]
        parts = [r @ v.factors[1].double() for r, v in zip(R.split(ranks, -1), vectors, strict=True)]
    else:
        parts = [v.dense().double() for v in vectors]
        Q = torch.eye(parts[0].shape[-2], dtype=torch.float64)
    low = torch.linalg.qr(torch.cat(parts, -1).mT, mode="r").R.mT  # the same left vectors and values as the whole
    U, S, _ = torch.linalg.svd(low, full_matrices=False)
    k = max(1, int((SMALLEST * S.amax(-1, keepdim=True).clamp_min(1e-300) < S).sum(-1).max())) if S.numel() else 0
    U = U[..., :k]
    return [(U.mT @ p).float() for p in parts], lambda Z: {"factors": ((Q @ U).float(), Z)}


SPACES = {"dense": dense, "knots": knots}
