"""QA-LoRA: an update that is constant over groups of inputs, so that it goes into zero points exactly. Xu et al., 2023, arXiv 2309.14717.

    W' = W + s B A P,   (P x)_l = the mean of x over group l,   s = alpha / r

A (r, l) and B (o, r) train, l = i / group; A starts uniform in ±sqrt(6/(r + l)) (Xavier), B at zero, so W' = W at step 0. pooling sum (the authors'
code has an average): P x is the group's sum. On a base of whole numbers w = σ (q - z) in groups no wider than these, merging is exact:
z' = z - s (B A) / (σ · group), codes and scales unchanged (`lorakit.merge(model, "exact")`). PEFT's `use_qalora` scales the mean by the number of
groups, neither of the two; its files are another method.
"""

from __future__ import annotations

import torch

from lorakit.method import Leaf, LowRank, check_rank, choice, method, zeros


def xavier(shape, method, origin, gen):
    return (torch.rand(shape, generator=gen) * 2 - 1) * (6 / sum(shape)) ** 0.5


@method("qa-lora", title="QA-LoRA", paper="2309.14717", formula="W + (alpha/r) B A P, P the mean over groups of inputs", laws=("rank<=r", "identity"))
class QALoRA(LowRank):
    r: int = 8  # rank
    alpha: float = 16.0  # strength: the update is scaled by alpha / r
    group: int = 32  # inputs that share a number of A; a multiple of the base's group merges exactly
    pooling: str = choice("mean", ("mean", "sum"))  # what becomes of the inputs of a group

    A = Leaf("r l", xavier)
    B = Leaf("o r", zeros)

    def __post_init__(self):
        check_rank("qa-lora", self.r)
        check_rank("qa-lora (group)", self.group)

    @classmethod
    def examples(cls):
        return [cls(3, 7.0, 4, "sum"), cls(2, 5.0, 2)]

    def dims(self, o, i):
        return super().dims(o, i) | {"l": i // self.group}

    def unfit(self, site):
        good = next((g for g in (64, 32, 16, 8, 4, 2, 1) if g <= self.group and site.in_ % g == 0), 1)
        return f"qa-lora: {site.in_} inputs are no whole groups of {self.group}; mend: group={good}" if site.in_ % self.group else None

    @property
    def share(self) -> float:
        return 1 / self.group if self.pooling == "mean" else 1.0

    def factors(self, p):
        return p["B"] * (self.alpha / self.r), (p["A"] * self.share).repeat_interleave(self.group, -1)

    def update(self, p, x, f, site, drop):
        if site.slides or site.lookup:
            return super().update(p, x, f, site, drop)
        pooled = drop(x).unflatten(-1, (-1, self.group)).sum(-1)
        return pooled @ (p["A"] * self.share).to(x.dtype).mT @ (p["B"] * (self.alpha / self.r)).to(x.dtype).mT
