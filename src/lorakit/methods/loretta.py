"""LoRETTA_rep: a LoRA whose factors are tensor trains. Yang et al., 2024, NAACL 2024 (2024.naacl-long.174), arXiv 2402.11417.

    W' = W + s B A,   s = alpha / r,   Aᵀ (i, r) and Bᵀ (r, o) each a tensor train: entry j_1 … j_K is G_1[:, j_1] … G_K[:, j_K]

Only the cores G_k (r_{k-1}, n_k, r_k) train; the inner ranks are `tensor_rank`. A matrix's entries are taken in row-major order (no pairs of row and
column indices), and its size is cut into `modes` sizes as equal as its prime factors let them be, where the authors' tables have
mistakes. The last core of B starts at zero, so W' = W at step 0; start "random" is the authors' own and changes the model. The
others are normal such that an entry of A has variance 1/i and one of B 1/o (the authors: 1/(i + r) and 1/(o + r)).
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.kernels.tensor_train import contract, modes
from lorakit.method import Leaf, LowRank, check_rank, choice, method


def core(shape, method, origin, gen):
    """Normal; K such cores of a matrix of n r entries make entries of variance 1/n."""
    return torch.randn(shape, generator=gen) * (method.r ** (1 / method.modes) / (shape[1] * shape[2])) ** 0.5


def last_core(shape, method, origin, gen):
    return torch.zeros(shape) if method.begin == "zero" else core(shape, method, origin, gen)


@method("loretta", title="LoRETTA_rep", paper="2402.11417", formula="W + (alpha/r) B A, both tensor trains", laws=("rank<=r", "identity"))
class LoRETTA(LowRank):
    r: int = 8  # rank
    alpha: float = 16.0  # strength: the update is scaled by alpha / r
    tensor_rank: int = 5  # inner ranks of the trains
    modes: int = 5  # number of cores of a train
    begin: str = choice("zero", ("zero", "random"))  # the last core of B: zero, or drawn as the others (changes the model at step 0)

    def __post_init__(self):
        check_rank("loretta", self.r)
        if self.tensor_rank < 1 or not 1 <= self.modes <= 9:
            raise LorakitError(f"loretta: tensor_rank is at least 1 and modes 1 to 9, not {self.tensor_rank} and {self.modes}")

    @classmethod
    def examples(cls):
        return [cls(2, 5.0, 3, 3), cls(1, 20.0, 1, 2, "random"), cls(3, 4.0, 2, 1)]

    @property
    def laws(self):
        return self.card.laws if self.begin == "zero" else ("rank<=r",)

    @property
    def leaves(self):
        ends = ["one", *["tensor_rank"] * (self.modes - 1), "one"]
        return {f"{m}{k + 1}": Leaf(f"{ends[k]} n_{m}{k + 1} {ends[k + 1]}", last_core if (m, k) == ("b", self.modes - 1) else core)
                for m in "ab" for k in range(self.modes)}

    def dims(self, o, i):
        sizes = {f"n_{m}{k + 1}": n for m, size in (("a", i), ("b", o)) for k, n in enumerate(modes(size * self.r, self.modes))}
        return super().dims(o, i) | sizes | {"one": 1}

    def factors(self, p):
        A, B = (contract([p[f"{m}{k + 1}"] for k in range(self.modes)]) for m in "ab")
        return B.view(self.r, -1).mT * (self.alpha / self.r), A.view(-1, self.r).mT
