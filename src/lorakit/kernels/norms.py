"""Row norms of W + B A without forming it (DoRA, 2402.09353, needs them at every step)."""

from __future__ import annotations

from torch import Tensor


def row_norm_of_sum_slow(W: Tensor, B: Tensor, A: Tensor) -> Tensor:  # (o, i), (o, r), (r, i) -> (o,)
    return (W + B @ A).norm(dim=1)


def row_norm_of_sum(row_sq: Tensor, W: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """|W_o + B_o A|² = |W_o|² + 2 B_o·(W Aᵀ)_o + B_o (A Aᵀ) B_oᵀ, with |W_o|² (`row_sq`, (o,)) kept by the caller.

    Costs 2·o·i·r operations and no (o, i) temporary. Clamped at 0, where rounding can push a vanishing norm below it.
    """
    B, A = B.to(W.dtype), A.to(W.dtype)
    cross = (W @ A.mT) * B  # (o, r)
    own = (B @ (A @ A.mT)) * B  # (o, r)
    return (row_sq + (2 * cross + own).sum(1)).clamp_min(0).sqrt()
