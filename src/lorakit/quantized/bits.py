"""Which matrix gets how many bits: the least error within a budget. LQ-LoRA, Guo et al., 2023, arXiv 2311.12023.

    minimise Σ_ij ‖√F_i ∘ (W_i - q_j(W_i))‖² x_ij   with Σ_j x_ij = 1 for every matrix i,  Σ_ij bits_ij x_ij ≤ budget · all numbers,  x_ij ∈ {0, 1}

F_i: how much the loss feels each weight (`fisher`), 1 where it is not given. The paper's grid varies the constants' precision too; here a candidate is
any scheme.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError, extra
from lorakit.quantized import own_weights
from lorakit.sites import site_for
from lorakit.stores.scheme import Scheme, scheme_of
from lorakit.targets import select

CANDIDATES = ("nf2", "nf3", "nf4", "int8")


@torch.no_grad()
def allot(model: nn.Module, bits: float, candidates: Sequence[str | Mapping[str, Any] | Scheme] = CANDIDATES, *,
          target_modules: str | Sequence[str] = "all-linear", exclude_modules: str | Sequence[str] = (),
          importance: Mapping[str, Tensor] | None = None) -> list[dict[str, Any]]:
    """[{scheme, layers}, …] for `lorakit.quantize`, of at most `bits` bits a weight on average. LorakitError where no choice is so small."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import block_diag
    except ImportError:
        raise extra("scipy", "train") from None
    import numpy as np

    schemes = [scheme_of(c) for c in candidates]
    modules = dict(model.named_modules())
    paths = own_weights(model, select(model, target_modules, exclude_modules))
    cost, size, numbers = [], [], 0
    for path in paths:
        site = site_for(modules[path], path)
        M = site.view(modules[path].weight).float()
        F = importance[path].to(M) if importance else None
        numbers += M.numel()
        cost.append([_error(s, M, F) for s in schemes])
        size.append([8 * s.bytes(*M.shape) if c < float("inf") else 0 for s, c in zip(schemes, cost[-1], strict=True)])
        if min(cost[-1]) == float("inf"):
            raise LorakitError(f"{path}: none of the candidates can hold a matrix of {M.shape[0]} x {M.shape[1]}; mend: nf4 among them")
    c, s = np.array(cost), np.array(size, dtype=float)
    possible = np.isfinite(c).ravel().astype(float)
    scale = max(c[np.isfinite(c)].max(), 1e-30)
    found = milp(np.where(np.isfinite(c), c / scale, 0.0).ravel(), bounds=Bounds(0, possible), integrality=np.ones(c.size), constraints=[
        LinearConstraint(block_diag([np.ones((1, len(schemes)))] * len(paths)), 1, 1), LinearConstraint(s.ravel()[None] / numbers, -np.inf, bits)])
    if found.x is None:
        low = sum(min(x for x, y in zip(a, b, strict=True) if y < float("inf")) for a, b in zip(size, cost, strict=True)) / numbers
        raise LorakitError(f"quantize: no choice among {', '.join(x.name for x in schemes)} takes at most {bits} bits a weight; the smallest takes {low:.3f}")
    chosen = found.x.reshape(c.shape).argmax(1)
    groups = [{"scheme": scheme.to_dict(), "layers": [p for p, k in zip(paths, chosen, strict=True) if k == j]} for j, scheme in enumerate(schemes)]
    return [g for g in groups if g["layers"]]


def _error(scheme: Scheme, M: Tensor, F: Tensor | None) -> float:
    try:
        scheme.fits(*M.shape)
    except LorakitError:
        return float("inf")
    gap = (M - scheme.matrix(scheme.parts(M), *M.shape, torch.float32)).square()
    return float((gap if F is None else gap * F).double().sum())


def fisher(model: nn.Module, data: Iterable[Mapping[str, Tensor]], paths: Sequence[str]) -> dict[str, Tensor]:
    """Path -> the sum over rows of the squared gradient of each row's loss by the weight (o, i), float32 on the CPU. data: batches with labels."""
    modules = dict(model.named_modules())
    weights = {p: modules[p].weight for p in paths}
    flags = {p: w.requires_grad for p, w in weights.items()}
    out = {p: torch.zeros_like(w, dtype=torch.float32, device="cpu") for p, w in weights.items()}
    rows = 0
    try:
        for w in weights.values():
            w.requires_grad_(True)
        for batch in data:
            for k in range(len(next(iter(batch.values())))):
                loss = model(**{n: t[k : k + 1] for n, t in batch.items()}).loss
                for (p, _), g in zip(weights.items(), torch.autograd.grad(loss, list(weights.values())), strict=True):
                    out[p] += g.detach().float().cpu().square()
                rows += 1
    finally:
        for p, w in weights.items():
            w.requires_grad_(flags[p])
    if not rows:
        raise LorakitError("fisher: the data holds no row")
    return {p: site_for(modules[p], p).view(F) for p, F in out.items()}
