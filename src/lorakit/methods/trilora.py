"""TriLoRA: LoRA with a trained core between its factors. Feng et al., 2024, arXiv 2405.11236; its full core: arXiv 2402.16842.

    W' = W + s B M A,   s = alpha / r

A (r, i), B (o, r) and the core M train; M is a diagonal (r) or a full matrix (r, r). W' = W at step 0 because one of two is zero: M, and then B
starts as A does, uniform in ±1/sqrt of its width; or B, and then M starts as the identity. While M is zero, A and B have no gradient: the first
step moves M alone. TriLoRA is the diagonal from zero, without orthogonality term or pruning (of two public implementations one has no alpha / r).
The full core from the identity is the middle matrix of Asymmetric LoRA.
"""

from __future__ import annotations

import dataclasses

import torch

from lorakit.method import SCALINGS, Leaf, LowRank, check_rank, choice, kaiming, method, zeros


def identity(shape, method, origin, gen):
    return torch.ones(shape) if len(shape) == 1 else torch.eye(*shape)


@method("trilora", title="TriLoRA", paper="2405.11236", formula="W + s B M A, M diagonal or full", laws=("rank<=r", "identity"))
class TriLoRA(LowRank):
    r: int = 8  # rank
    alpha: float = 16.0  # strength: the update is scaled by s
    scaling: str = choice("standard", SCALINGS)  # standard: alpha/r; rslora: alpha/sqrt(r); alpha: alpha
    middle: str = choice("diagonal", ("diagonal", "matrix"))  # M: r numbers, or r x r
    begin: str = choice("zero", ("zero", "identity"))  # where M starts; B starts at zero where M does not

    A = Leaf("r i", kaiming, key="lora_A.weight")
    B = Leaf("o r", kaiming, key="lora_B.weight")
    M = Leaf("r", zeros, key="lora_E")

    def __post_init__(self):
        check_rank("trilora", self.r)

    @property
    def leaves(self):
        B, M = self.own["B"], self.own["M"]
        M = dataclasses.replace(M, axes="r r") if self.middle == "matrix" else M
        return self.own | ({"B": B, "M": M} if self.begin == "zero" else {
            "B": dataclasses.replace(B, start=zeros), "M": dataclasses.replace(M, start=identity)})

    @classmethod
    def examples(cls):
        return [cls(3, 4.8, "rslora"), cls(2, 3.0, middle="matrix", begin="identity"), cls(1, 2.0, "alpha", begin="identity")]

    def factors(self, p):
        return p["B"] * SCALINGS[self.scaling](self.alpha, self.r), p["M"], p["A"]
