"""LoHa: low-rank Hadamard product. Hyeon-Woo et al. (FedPara), 2021, arXiv 2108.06098; LyCORIS, 2023, arXiv 2309.14859.

    W' = W + s (w1_a w1_b) ∘ (w2_a w2_b),   s = alpha / r

w1_a, w2_a (o, r) and w1_b, w2_b (r, i) train: the update reaches rank r² with the numbers of a LoRA of rank 2r. One factor starts at
zero, so W' = W at step 0: w2_b (PEFT, the others uniform) or w2_a (LyCORIS, the others normal). The Hadamard product is again a product of
two factors of rank r², their rows' and columns' Kronecker products; that way is taken where those are smaller than the (o, i) matrix.
"""

from __future__ import annotations

from lorakit.kernels.tensor_train import pays
from lorakit.method import Additive, Leaf, Start, check_rank, choice, kaiming, method, normal, refuse, zeros

STARTS = ("peft", "lycoris")


def by_start(peft: Start, lycoris: Start) -> Start:
    """The start that the method's field `begin` names."""
    return lambda shape, method, origin, gen: (peft if method.begin == "peft" else lycoris)(shape, method, origin, gen)


@method("loha", title="LoHa", paper="2108.06098", formula="W + (alpha/r) (w1_a w1_b) ∘ (w2_a w2_b)", laws=("rank<=min(r * r, o, i)", "identity"))
class LoHa(Additive):
    varies = {"rank_pattern": ("r", "r"), "alpha_pattern": ("alpha", "alpha")}
    peft_layers = ("linear", "conv1d", "conv2d")

    r: int = 8  # rank of each of the two products; the update reaches its square
    alpha: float = 8.0  # strength: the update is scaled by alpha / r
    begin: str = choice("peft", STARTS)  # which factor starts at zero: w2_b, the others uniform (peft); w2_a, the others normal (lycoris)

    w1_a = Leaf("o rank", by_start(kaiming, normal(0.1)), key="hada_w1_a")  # `rank`, `flat`: files keep them flat on convolutions, as PEFT's do
    w1_b = Leaf("rank flat", by_start(kaiming, normal(1.0)), key="hada_w1_b")
    w2_a = Leaf("o rank", by_start(kaiming, zeros), key="hada_w2_a")
    w2_b = Leaf("rank flat", by_start(zeros, normal(1.0)), key="hada_w2_b")

    def __post_init__(self):
        check_rank("loha", self.r)

    @classmethod
    def examples(cls):
        return [cls(2, 5.0), cls(3, 4.0, "lycoris"), cls(1, 3.0)]

    def dims(self, o, i):
        return super().dims(o, i) | {"rank": self.r, "flat": i}

    def two(self, p):
        a, b = p["w1_a"], p["w1_b"]
        if not pays(self.r**2, a.shape[-2], b.shape[-1]):
            return None
        return (a[:, :, None] * p["w2_a"][:, None]).flatten(1) * (self.alpha / self.r), (b[:, None] * p["w2_b"]).flatten(0, 1)

    def delta(self, p, W):
        return (p["w1_a"] @ p["w1_b"]) * (p["w2_a"] @ p["w2_b"]) * (self.alpha / self.r)

    def transpose(self, p):
        return {k.translate(str.maketrans("ab", "ba")): t.mT for k, t in p.items()}

    def to_peft(self):
        return {"peft_type": "LOHA", "r": self.r, "alpha": self.alpha, "rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False,
                "init_weights": True}

    @classmethod
    def from_peft(cls, config):
        if config.get("peft_type") != "LOHA":
            return None
        refuse(config, use_effective_conv2d=False)
        return cls(config.get("r", 8), float(config.get("alpha", 8)))
