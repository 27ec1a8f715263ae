"""The thin singular value decomposition with a sign that does not depend on the machine."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def thin_svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W (…, o, i) = U diag(S) Vh in at least float32: U (…, o, k), S (…, k) descending, Vh (…, k, i), k = min(o, i).

    A pair of singular vectors is free up to a common sign; here the largest entry (by magnitude) of every left vector is positive.
    """
    U, S, Vh = torch.linalg.svd(W if W.dtype == torch.float64 else W.float(), full_matrices=False)
    sign = torch.gather(U, -2, U.abs().argmax(-2, keepdim=True)).sign()
    return U * sign, S, Vh * sign.mT


@torch.no_grad()
def fast_svd(W: Tensor, k: int, niter: int, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The first k triplets of W (…, o, i), nearly: randomised subspace iteration (Halko et al., arXiv 0909.4061), niter rounds, no oversampling."""
    Q = torch.linalg.qr(W @ torch.randn(W.shape[-1], k, generator=gen)).Q
    for _ in range(niter):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    U = Q @ U
    sign = torch.gather(U, -2, U.abs().argmax(-2, keepdim=True)).sign()
    return U * sign, S, Vh * sign.mT


@torch.no_grad()
def lower_rank(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """B' and A' of this rank nearest to B A (…, o, i), which is never formed; the norm of what is left out, and of B A.

    B = Q_B R_B,   Aᵀ = Q_A R_A,   R_B R_Aᵀ = U diag(σ) Vᵀ (r x r)   →   B' = Q_B U_q diag(σ_q),   A' = V_qᵀ Q_Aᵀ
    """
    (QB, RB), (QA, RA) = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().mT)
    U, S, V = torch.linalg.svd(RB @ RA.mT, full_matrices=False)
    q = min(rank, S.shape[-1])
    B2, A2 = QB @ (U[..., :q] * S[..., None, :q]), V[..., :q, :] @ QA.mT
    return B2.to(B.dtype), A2.to(A.dtype), float(S[..., q:].norm()), float(S.norm())
