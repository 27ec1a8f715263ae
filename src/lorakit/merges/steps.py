"""The steps that elementwise rules are made of. τ is one source's tensor; weights are already in where a step says so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def trim(t: Tensor, cut: float, above: float = float("inf")) -> Tensor:
    """Keeps cut <= |τ| < above."""
    size = t.abs()
    keep = size >= cut
    return t * (keep & (size < above) if above != float("inf") else keep)


def drop(t: Tensor, keep: Tensor | float, gen: torch.Generator | None) -> Tensor:
    """m ⊙ τ / p with m ~ Bernoulli(p): each number stays with probability p (`keep`) and is scaled so that the mean is τ."""
    p = keep if isinstance(keep, Tensor) else torch.full_like(t, keep)
    return t * torch.bernoulli(p, generator=gen) / p


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    return [t if w == 1 else t * w for t, w in zip(tensors, weights, strict=True)]


def summed(tensors: Sequence[Tensor]) -> Tensor:
    """Σ τ_t."""
    out = tensors[0].clone()
    for t in tensors[1:]:
        out += t
    return out


def elect(tensors: Sequence[Tensor], by: str) -> Tensor:
    """γ = sgn Σ τ_t ("mass"), or sgn Σ sgn τ_t ("count")."""
    return summed(tensors if by == "mass" else [t.sign() for t in tensors]).sign()


def disjoint_mean(tensors: Sequence[Tensor], weights: Sequence[float], sign: Tensor) -> Tensor:
    """Σ τ_t / Σ |w_t| over the t with sgn τ_t = γ ≠ 0 (the weights are in τ already); 0 where there is none."""
    out, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for t, w in zip(tensors, weights, strict=True):
        agrees = t.sign() == sign
        out += t * agrees
        count += agrees * abs(w)
    return torch.where(count > 0, out / count.clamp_min(1e-30), out)
