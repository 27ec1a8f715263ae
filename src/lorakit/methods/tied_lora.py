"""Tied-LoRA: one pair of factors for all layers. Renduchintala et al., 2023, arXiv 2311.09578.

    W'_l = W_l + s diag(v_l) B diag(u_l) A,   s = alpha / r

A (r, i) and B (o, r) are one pair for all targets of one name and shape (all q_proj), u (r) and v (o) are each layer's own. Which of the
four train are flags; the paper's TL1 to TL6 are combinations of them (its table could not be read, so there are no such names here).
A starts as in LoRA, B at zero, u and v at one; with B frozen it must be random, so then v starts at zero. Either way W' = W at step 0.
With B and v both at zero nothing would ever move, so that start does not exist here. One gradient of A is the sum over the layers.
"""

from __future__ import annotations

import dataclasses

from lorakit.errors import LorakitError
from lorakit.method import Leaf, LowRank, check_rank, choice, kaiming, method, ones, zeros
from lorakit.methods.lotr import GROUPS, shared_leaves


@method("tied-lora", title="Tied-LoRA", paper="2311.09578", formula="W + s diag(v) B diag(u) A, A and B shared", laws=("rank<=r", "identity"),
        aliases=("tied_lora", "tiedlora"))
class TiedLoRA(LowRank):
    r: int = 8  # rank
    alpha: float = 16.0  # strength: the update is scaled by alpha / r
    share: str = choice("name", (*GROUPS, "none"))  # who shares A and B; none: each layer has its own
    train_A: bool = True
    train_B: bool = True
    train_u: bool = True  # the scales of the r directions
    train_v: bool = True  # the scales of the outputs

    A = Leaf("r i", kaiming, shared="name")
    B = Leaf("o r", zeros, shared="name")
    u = Leaf("r", ones)
    v = Leaf("o", ones)

    def __post_init__(self):
        check_rank("tied-lora", self.r)
        if not (self.train_B or self.train_v):
            raise LorakitError("tied-lora: B or v must train, else the update stays zero")

    @classmethod
    def examples(cls):
        return [cls(4, 9.6, "model", train_u=False), cls(2, 5.0, "shape", train_A=False, train_B=False), cls(3, 4.0, "none", train_v=False)]

    @property
    def leaves(self):
        table = shared_leaves(self.own, ("A", "B"), self.share)
        table = {k: dataclasses.replace(leaf, trains=getattr(self, f"train_{k}")) for k, leaf in table.items()}
        if not self.train_B:
            table |= {"B": dataclasses.replace(table["B"], start=kaiming), "v": dataclasses.replace(table["v"], start=zeros)}
        return {k: leaf for k, leaf in table.items() if k in "AB" or leaf.trains}

    def factors(self, p):
        v, u = ([p[k]] if k in p else [] for k in "vu")
        return *v, p["B"] * (self.alpha / self.r), *u, p["A"]
