"""LoHa: low-rank Hadamard product. Hyeon-Woo et al. (FedPara), 2021, arXiv 2108.06098; LyCORIS, 2023, arXiv 2309.14859.

    W' = W + s (a1 b1) ∘ (a2 b2),   s = alpha / r
    plain:    a = w_a (o, r),   b = w_b (r, i)
    tucker:   a = w_aᵀ, w_a (r, o),   b[j, c p] = sum_q t[j, q, p] w_b[q, c],   w_b (r, channels), t (r, r, pixels)

All of them train: the update reaches rank r² with the numbers of a LoRA of rank 2r. `tucker` (FedPara's proposition 3; PEFT's use_effective_conv2d)
is for convolutions whose kernel has more than one pixel; other layers stay plain. One factor starts at zero, so W' = W at step 0: w2_b (PEFT, the
others uniform) or w2_a (LyCORIS, the others normal). The Hadamard product is again a product of two factors of rank r², their rows' and columns' Kronecker
products; that way is taken where those are smaller than the (o, i) matrix. On a linear layer neither they nor the matrix are kept for the backward pass.
"""

from __future__ import annotations

import dataclasses
import math

from lorakit.kernels.products import columns, cored, hadamard, made, rows, through
from lorakit.kernels.tensor_train import pays
from lorakit.maps import same
from lorakit.method import Additive, Leaf, Start, check_rank, choice, kaiming, method, normal, zeros

STARTS = ("peft", "lycoris")


def by_start(peft: Start, lycoris: Start) -> Start:
    """The start that the method's field `begin` names."""
    return lambda shape, method, origin, gen: (peft if method.begin == "peft" else lycoris)(shape, method, origin, gen)


class Lycoris(Additive):
    """A method with the fields r, alpha, tucker, begin and kernel: the pixels of the convolution that it is on, 0 on other layers."""

    varies = {"rank_pattern": ("r", "r"), "alpha_pattern": ("alpha", "alpha")}
    peft_layers = ("linear", "conv1d", "conv2d")

    @property
    def s(self) -> float:
        return self.alpha / self.r

    @property
    def leaves(self):  # the factors beside a core lie the other way round
        return self.own | ({k: dataclasses.replace(self.own[k], axes=axes) for k, axes in self.beside.items()} if self.tucker and self.kernel > 1 else {})

    def dims(self, o, i):
        return super().dims(o, i) | {"rank": self.r, "rp": self.r * self.kernel, "core": int(self.tucker and self.kernel > 1)}

    def on(self, site):
        return dataclasses.replace(self, kernel=math.prod(site.raw[1:]) if site.slides else 0)

    def layout(self, leaf, site):  # PEFT's cores have two dimensions of pixels at least
        return (self.r, self.r, *site.raw[1:], *[1] * (2 - site.n)) if leaf.startswith("t") else None

    def to_peft(self):
        return {"peft_type": self.name.upper(), "r": self.r, "alpha": self.alpha, "rank_dropout": 0.0, "module_dropout": 0.0,
                "use_effective_conv2d": self.tucker, "init_weights": True}


@method("loha", title="LoHa", paper="2108.06098", formula="W + (alpha/r) (w1_a w1_b) ∘ (w2_a w2_b)", laws=("rank<=min(r * r, o, i)", "identity"))
class LoHa(Lycoris):
    beside = {"w1_a": "rank o", "w1_b": "rank c", "w2_a": "rank o", "w2_b": "rank c"}

    r: int = 8  # rank of each of the two products; the update reaches its square
    alpha: float = 8.0  # strength: the update is scaled by alpha / r
    begin: str = choice("peft", STARTS)  # which factor starts at zero: w2_b, the others uniform (peft); w2_a, the others normal (lycoris)
    tucker: bool = False  # on convolutions with a kernel: each product has a core of its own
    kernel: int = 0  # pixels of the layer's kernel; filled in from each convolution

    w1_a = Leaf("o rank", by_start(kaiming, normal(0.1)), key="hada_w1_a")  # `rank`, `flat`: files keep them flat on convolutions, as PEFT's do
    w1_b = Leaf("rank flat", by_start(kaiming, normal(1.0)), key="hada_w1_b")
    w2_a = Leaf("o rank", by_start(kaiming, zeros), key="hada_w2_a")
    w2_b = Leaf("rank flat", by_start(zeros, normal(1.0)), key="hada_w2_b")
    t1 = Leaf("rank rp", by_start(kaiming, normal(0.1)), key="hada_t1", only="core")
    t2 = Leaf("rank rp", by_start(kaiming, normal(0.1)), key="hada_t2", only="core")

    def __post_init__(self):
        check_rank("loha", self.r)

    @classmethod
    def examples(cls):
        return [cls(2, 5.0), cls(3, 4.0, "lycoris", True), cls(1, 3.0), cls(2, 3.0, tucker=True)]

    def dims(self, o, i):
        return super().dims(o, i) | {"flat": i, "c": i // max(self.kernel, 1)}

    def pairs(self, p):
        """a1, a2 (o, r) and b1, b2 (r, i)."""
        if "t1" in p:
            return p["w1_a"].mT, p["w2_a"].mT, cored(p["t1"], p["w1_b"]), cored(p["t2"], p["w2_b"])
        return p["w1_a"], p["w2_a"], p["w1_b"], p["w2_b"]

    def two(self, p):
        a1, a2, b1, b2 = self.pairs(p)
        return (rows.make(a1, a2) * self.s, columns.make(b1, b2)) if pays(self.r**2, a1.shape[-2], b1.shape[-1]) else None

    def delta(self, p, W):
        return made(hadamard, *self.pairs(p)) * self.s

    def update(self, p, x, f, site, drop):
        if site.lookup or site.slides:
            return super().update(p, x, f, site, drop)
        a1, a2, b1, b2 = self.pairs(p)
        if pays(self.r**2, a1.shape[-2], b1.shape[-1]):
            return through(rows, through(columns, x, b1, b2, drop=drop) * self.s, a1, a2, drop=same)
        return through(hadamard, x, a1, a2, b1, b2, drop=drop) * self.s

    def transpose(self, p):
        return {k.translate(str.maketrans("ab", "ba")): t.mT for k, t in p.items()}

    @classmethod
    def from_peft(cls, config):
        if config.get("peft_type") != "LOHA":
            return None
        return cls(config.get("r", 8), float(config.get("alpha", 8)), tucker=bool(config.get("use_effective_conv2d")))
