"""Flora: gradients are compressed by random projections, drawn anew now and then. Hao, Cao, Mou, 2024, arXiv 2402.03293.

    P (side, r), entries N(0, 1) / √r, for the smaller side;  C = Pᵀ G (or G P);   W := W + scale · P (the optimiser's step for C)
    every κ steps:  a new P', and the running average of gradients goes along:  C_avg := P'ᵀ P C_avg

E[P Pᵀ] = I, so the step is unbiased. With one P for ever and plain gradient descent it is LoRA with its random factor frozen; drawing
it anew lets the sum of steps have any rank. For the adapter `full`. The paper compresses what Adafactor makes of the gradient; here the
gradient itself is compressed, so that any optimiser may follow. Not the tensor method FLoRA (2405.14739).
"""

from __future__ import annotations

import torch

from lorakit.hooks.base import hook
from lorakit.hooks.galore import Projected
from lorakit.hooks.surgery import draw


@hook("flora", "Flora", "2402.03293", "W := W + scale · P step(Pᵀ G), P random, drawn anew")
class Flora(Projected):
    r: int = 16  # dimension of the projection
    every: int = 1000  # κ: steps for which a projection is kept
    scale: float = 1.0  # of the step
    seed: int = 0  # of the projections

    def basis(self, path, G, step):
        side = min(G.shape[-2:])
        return torch.randn(*G.shape[:-2], side, self.r, generator=draw(self.seed, step - step % self.every, f"flora {path}")).to(G.device) * self.r**-0.5

    def changed(self, optimizer, small, old, new, left):
        for name in ("exp_avg", "momentum_buffer"):
            t = optimizer.state.get(small, {}).get(name)
            if t is not None:
                t.copy_(new.mT @ (old @ t) if left else (t @ old.mT) @ new)
