"""AFLoRA: adaptive freezing of low-rank adaptation. Liu et al., 2024, arXiv 2403.13269.

    W' = W + diag(b) B diag(d) A

A (r, i), B (o, r), d (r) and b (o) train: VeRA with factors of each layer's own. A and B start uniform in ±sqrt(6/fan_in), d at d_initial, b at
zero, so W' = W at step 0. There is no alpha / r. In training A and B freeze one by one and the vectors stay. While b is zero it alone has a gradient.
"""

from __future__ import annotations

from lorakit.method import Leaf, LowRank, check_rank, constant, method, zeros
from lorakit.methods.vera import kaiming_relu


@method("aflora", title="AFLoRA", paper="2403.13269", formula="W + diag(b) B diag(d) A", laws=("rank<=r", "identity"))
class AFLoRA(LowRank):
    r: int = 4  # rank
    d_initial: float = 0.1  # where d starts

    A = Leaf("r i", kaiming_relu, key="lora_A.weight")
    B = Leaf("o r", kaiming_relu, key="lora_B.weight")
    d = Leaf("r", constant("d_initial"), key="lora_d")
    b = Leaf("o", zeros, key="lora_db")

    def __post_init__(self):
        check_rank("aflora", self.r)

    @classmethod
    def examples(cls):
        return [cls(3, 0.4)]

    def factors(self, p):
        return p["b"], p["B"], p["d"], p["A"]
