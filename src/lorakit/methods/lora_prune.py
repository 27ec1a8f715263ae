"""LoRA on a base whose outputs can be switched off: what LoRAPrune trains. Zhang et al., 2023, arXiv 2305.18403.

    y = m · (W x + s B A x + b), so W' = diag(m) (W + s B A), b' = m · b,   s = alpha / r

A (r, i) and B (o, r) train and start as in LoRA; the mask m (o) is one at first, so W' = W at step 0, and does not train: `hooks/lora_prune.py`
sets whole heads and channels of it to zero. Merged, their rows are zero.
"""

from __future__ import annotations

from lorakit.method import Leaf, Method, check_rank, kaiming, method, ones, zeros


@method("lora-prune", title="LoRAPrune", paper="2305.18403", formula="diag(m) (W + s B A), m of zeros and ones", laws=("identity",), aliases=("loraprune",))
class LoRAPrune(Method):
    r: int = 8  # rank
    alpha: float = 16.0  # strength: the update is scaled by alpha / r

    A = Leaf("r i", kaiming, key="lora_A.weight")
    B = Leaf("o r", zeros, key="lora_B.weight")
    m = Leaf("o", ones, trains=False, key="lora_mask")

    def __post_init__(self):
        check_rank("lora-prune", self.r)

    @property
    def s(self) -> float:
        return self.alpha / self.r

    def weight(self, p, W):
        return p["m"][:, None].to(W.dtype) * (W + (p["B"] * self.s @ p["A"]).to(W.dtype))

    def act(self, p, x, f, site, drop):
        dtype = x.dtype if x.is_floating_point() else site.dtype
        y = f(x) + site.chain(x, p["B"].to(dtype), self.s, p["A"].to(dtype), drop=drop)
        return site.scale(y, p["m"].to(y.dtype), last=True)

    def bias(self, p, b):
        return None if b is None else b * p["m"].to(b.dtype)
