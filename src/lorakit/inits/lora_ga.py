"""LoRA-GA: the first step of the factors is the best low-rank step of the full weight. Wang et al., 2024, arXiv 2407.05000.

G = mean gradient of the loss by W over a few batches = U S Vᵀ (first 2r triplets; official: svd_lowrank with q = 4r, niter 4; niter 0: exact).
direction ArB2r: A = V_1..rᵀ, B = U_r+1..2r; A2rBr: the other way round; ArBr: A odd, B even ones of the 2r; random: disjoint halves.
scale stable: both factors × o^(1/4)/sqrt(gamma); gd: both / s; unit: neither. Then B Bᵀ G + G Aᵀ A is, up to the scale, the best
rank-2r approximation of G. This is the official form: PEFT multiplies B by the singular values of G as well and, in `stable`,
scales only B, so its start depends on the loss's scale.
"""

from typing import Literal

import torch

from lorakit.inits import init
from lorakit.inits.base import gradients, seen, strength
from lorakit.kernels.svd import fast_svd, thin_svd


def weight_gradients(model, plan, data, options):
    return gradients("lora-ga", model, {path: site for path, (_, site) in plan.items()}, data)


@init("lora-ga", title="LoRA-GA", formula="G = U S Vᵀ, A ~ V_1..rᵀ, B ~ U_r+1..2r, W := W - s B A", paper="2407.05000", nonzero=True, collect=weight_gradients)
def lora_ga(method, p, W, gen, *, found=None, direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r",
            scale: Literal["stable", "gd", "unit"] = "stable", gamma: float = 16.0, niter: int = 4):
    G, r = seen(p, found, 2), p["A"].shape[0]
    G = G / G.abs().max()  # directions only; tiny gradients keep their digits
    U, _, Vh = fast_svd(G, min(4 * r, *G.shape), niter, gen) if niter else thin_svd(G)
    first, second = torch.arange(r), torch.arange(r, 2 * r)
    mixed = torch.randperm(2 * r, generator=gen) if direction == "random" else None
    a, b = {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (2 * first, 2 * first + 1)}.get(direction) or (mixed[:r], mixed[r:])
    size = {"stable": len(U) ** 0.25 / gamma**0.5, "gd": 1 / strength(method), "unit": 1.0}[scale]
    p["A"].copy_(size * Vh[a])
    p["B"].copy_(size * U[:, b])
