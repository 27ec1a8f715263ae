"""NOLA: linear combinations of random bases. Koohpayegani et al., 2023, arXiv 2310.02556.

    W' = W + s B A,   A = A_0 + sum_j a_j A_j,   B = sum_j b_j B_j,   s = alpha / r

Only the coefficients a (bases_a) and b (bases_b) train, whatever the layer's size and r. The bases A_j (r, i) and B_j (o, r) are never
stored, neither in files nor for the backward pass: their entries, uniform in ±1/sqrt(bases), come from integer arithmetic on `seed`, the
number of the basis and the number of the entry, so they are the same on every device (the authors' generator differs between devices). A_0, uniform
in ±1/sqrt(i), comes from the seed, too, and keeps the start from being a dead one: a and b start at zero, so W' = W at step 0. A file
holds bases_a + bases_b + 3 numbers a layer. The seed is three digits below 256, which every floating-point type holds exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.kernels.random_basis import combine
from lorakit.method import Leaf, LowRank, check_rank, method, sizes, zeros


def digits(shape, method, origin, gen):
    return torch.randint(256, shape, generator=gen).float()


@method("nola", title="NOLA", paper="2310.02556", formula="W + (alpha/r) B A, both combinations of random bases", laws=("rank<=r", "identity"))
class NOLA(LowRank):
    r: int = 8  # rank
    alpha: float = 8.0  # strength: the update is scaled by alpha / r
    bases_a: int = 512  # number of bases of A
    bases_b: int = 512  # number of bases of B

    a = Leaf("bases_a", zeros)
    b = Leaf("bases_b", zeros)
    seed = Leaf("three", digits, trains=False)
    sizes = sizes()

    def __post_init__(self):
        check_rank("nola", self.r)
        if min(self.bases_a, self.bases_b) < 1:
            raise LorakitError(f"nola: bases_a and bases_b are at least 1, not {self.bases_a} and {self.bases_b}")

    @classmethod
    def examples(cls):
        return [cls(2, 6.0, 5, 7), cls(1, 3.0, 4, 3)]

    def dims(self, o, i):
        return super().dims(o, i) | {"three": 3}

    def factors(self, p):
        (o, i), seed = p["sizes"].shape[-2:], p["seed"]

        def mixed(c: Tensor, which: int, n: int) -> Tensor:
            return combine(c, seed, which, n).unflatten(0, (-1, n // self.r))

        A = mixed(torch.ones_like(p["a"][:1]), 0, self.r * i) * i**-0.5 + mixed(p["a"], 1, self.r * i) * self.bases_a**-0.5
        B = mixed(p["b"], 2, self.r * o).mT * self.bases_b**-0.5
        return B * (self.alpha / self.r), A
