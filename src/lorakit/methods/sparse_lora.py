"""Masked LoRA: factors with entries left out. SparseAdapter: He et al., 2022, arXiv 2210.04284; RoseLoRA: Wang et al., 2024, arXiv 2406.10777.

    W' = W + s (B ∘ MB) (A ∘ MA),   s = alpha / r

A (r, i) and B (o, r) train and start as in LoRA; MA and MB are frozen masks of zeros and ones. With keep = 1 they start at ones, for a training
rule that prunes later (RoseLoRA: rows of A and columns of B); below 1 a random part of every factor is left out from the start, SparseAdapter's
`rand`. SparseAdapter's own option `sparsity` is the part that is kept, too. Its Large-Sparse is a k times larger rank of which 1/k is kept.
An entry under the mask has neither effect nor gradient; scores that multiply with a gradient are all zero while B is.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.method import Leaf, LowRank, check_rank, kaiming, method, zeros


def random_mask(shape, method, origin, gen):
    """Ones but for `1 - keep` of the entries, rounded down, so at least one is left."""
    mask = torch.ones(shape).flatten()
    if (gone := int((1 - method.keep) * mask.numel() + 1e-9)) > 0:
        mask[torch.randperm(mask.numel(), generator=gen)[:gone]] = 0
    return mask.view(shape)


@method("sparse-lora", title="Masked LoRA", paper="2210.04284", formula="W + s (B ∘ MB) (A ∘ MA)", laws=("rank<=r", "identity"))
class SparseLoRA(LowRank):
    r: int = 8  # rank
    alpha: float = 16.0  # strength: the update is scaled by alpha / r
    keep: float = 1.0  # part of each factor that the random masks keep at the start

    A = Leaf("r i", kaiming, key="lora_A.weight")
    B = Leaf("o r", zeros, key="lora_B.weight")
    MA = Leaf("r i", random_mask, trains=False, key="mask_A")
    MB = Leaf("o r", random_mask, trains=False, key="mask_B")

    def __post_init__(self):
        check_rank("sparse-lora", self.r)
        if not 0 < self.keep <= 1:
            raise LorakitError(f"sparse-lora: keep is the part of the entries that stays, above 0 and at most 1, not {self.keep!r}")

    def factors(self, p):
        return p["B"] * p["MB"] * (self.alpha / self.r), p["A"] * p["MA"]
