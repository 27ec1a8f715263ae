"""CorDA: a decomposition of the weight that is oriented by the inputs it sees. Yang et al., 2024, arXiv 2406.05223.

C = mean of Xᵀ X over batches, each X divided by its largest magnitude;  W C = U S Vᵀ, V̂ = Vᵀ C⁻¹, so U S V̂ = W.
mode ipm (data of the task): the first r triplets; kpm (data of knowledge to keep): the last r, so that the frozen rest holds what
the data needs. A = sqrt(S/s) V̂, B = U sqrt(S/s). C is damped, 0.01 of its mean diagonal, doubled until C C⁻¹ = I within 0.05.
Where PEFT divides by |max(X)|, which may be near zero, this divides by max|X|; the same where the largest entry is positive.
Memory: one (i, i) matrix for each target.
"""

from typing import Literal

import torch

from lorakit.errors import LorakitError
from lorakit.inits import init
from lorakit.inits.base import put_triplets, seen, watch
from lorakit.kernels.svd import thin_svd


def covariances(model, plan, data, options):
    C, n = {}, {}

    def take(path, X):
        if len(X):
            X = X / X.abs().max().clamp_min(1e-30)
            C[path] = C.get(path, 0) + (X.mT @ X).cpu()
            n[path] = n.get(path, 0) + 1

    watch("corda", model, {path: site for path, (_, site) in plan.items()}, data, take)
    return {path: C[path] / n[path] for path in C}


@init("corda", title="CorDA", formula="W C = U S Vᵀ, s B A = U_k S_k V_kᵀ C⁻¹, W := W - s B A", paper="2406.05223", nonzero=True, collect=covariances)
def corda(method, p, W, gen, *, found=None, mode: Literal["ipm", "kpm"] = "ipm"):
    W, r, eye = seen(p, W()), p["A"].shape[0], torch.eye(len(found))
    step = float(found.diagonal().mean())
    for doubled in range(40):
        C = found + 0.01 * 2**doubled * step * eye
        inverse = torch.linalg.inv_ex(C).inverse
        if (C @ inverse - eye).norm() < 0.05:  # false for NaN as well
            break
    else:
        raise LorakitError("init corda: the inputs' covariance cannot be inverted (all zero?); mend: more data")
    U, S, Vh = thin_svd(W @ C)
    take = slice(None, r) if mode == "ipm" else slice(len(S) - r, None)
    put_triplets(method, p, U[:, take], S[take], Vh[take] @ inverse)
