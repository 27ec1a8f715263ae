"""SoRA: sparse low-rank adaptation, its gate. Ding et al., 2023, arXiv 2311.11696.

    W' = W + s B diag(g) A,   s = alpha / r

A (r, i), B (o, r) and the gate g (1, r) train. A starts as in LoRA, B at zero, g normal with deviation 1, so W' = W at step 0. Training shrinks g
towards zero with a proximal step; the rank is the number of gates that are not zero, and what a zero gate closes can be cut off exactly.
A closed gate still has a gradient, so it can open again.
"""

from __future__ import annotations

from lorakit.method import Leaf, LowRank, check_rank, kaiming, method, normal, zeros
from lorakit.methods.lora import folded


@method("sora", title="SoRA", paper="2311.11696", formula="W + s B diag(g) A", laws=("rank<=r", "identity"))
class SoRA(LowRank):
    r: int = 8  # rank at the beginning
    alpha: float = 16.0  # strength: the update is scaled by alpha / r

    A = Leaf("r i", kaiming, key="lora_A")
    B = Leaf("o r", zeros, key="lora_B")
    g = Leaf("one r", normal(1.0), key="gate")

    def __post_init__(self):
        check_rank("sora", self.r)

    def dims(self, o, i):
        return super().dims(o, i) | {"one": 1}

    def factors(self, p):
        return p["B"] * (self.alpha / self.r), p["g"].squeeze(-2), p["A"]

    def for_files(self, p):
        return folded(*self.factors(p)) or (self, p)
