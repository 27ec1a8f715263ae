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
