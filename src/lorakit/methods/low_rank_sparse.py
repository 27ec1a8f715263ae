"""Structured LoRA: a low-rank part and a sparse one together.

    W' = W + s B A + S,   s = alpha / r,   S zero but for k entries

A (r, i), B (o, r) and the k values v of S train; k = density · o · i, at least one. Where they are is drawn once for each layer, kept beside them
and never changes. A starts as in LoRA, B and v at zero, so W' = W at step 0. The low-rank part catches what all rows share, the sparse one single
weights, which no low rank could. The places are whole numbers in float32, rows apart from columns so that they are exact: an adapter cast below
float32 would lose them, and says so.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.method import Additive, Leaf, check_rank, kaiming, method, zeros


def places(shape, method, origin, gen):
    """Columns (row, column) of different entries, in order: drawn one by one until there are enough, so that no table of all is made."""
    o, i = origin().shape
    found = torch.empty(0, dtype=torch.long)
    while len(found) < shape[1]:
        found = torch.cat([found, torch.randint(o * i, (2 * shape[1],), generator=gen)]).unique()
    found = found[torch.randperm(len(found), generator=gen)[: shape[1]]].sort().values
    return torch.stack([found // i, found % i]).float()


@method("low-rank-sparse", title="Structured LoRA", formula="W + s B A + S, S sparse", laws=("identity",))
class LowRankSparse(Additive):
    r: int = 8  # rank of the low-rank part
    alpha: float = 16.0  # strength: the low-rank part is scaled by alpha / r
    density: float = 0.005  # part of the entries that the sparse part has

    A = Leaf("r i", kaiming, key="lora_A.weight")
    B = Leaf("o r", zeros, key="lora_B.weight")
    v = Leaf("k", zeros, key="sparse_values")
    at = Leaf("two k", places, trains=False, key="sparse_places")

    def __post_init__(self):
        check_rank("low-rank-sparse", self.r)
        if not 0 < self.density <= 1:
            raise LorakitError(f"low-rank-sparse: density is a part of the entries, above 0 and at most 1, not {self.density!r}")

    @classmethod
    def examples(cls):
        return [cls(2, 3.0, 0.1), cls(1, 5.0, 1.0)]

    def dims(self, o, i):
        return super().dims(o, i) | {"two": 2, "k": max(1, round(self.density * o * i))}

    def delta(self, p, W):
        A, B, v, at = (p[k] for k in ("A", "B", "v", "at"))
        if at.element_size() < 4:
            raise LorakitError(f"low-rank-sparse: its places do not survive {at.dtype}; mend: keep the adapter in float32")
        at, o, i = at.long(), B.shape[0], A.shape[1]
        S = v.new_zeros(o * i).index_put((at[0] * i + at[1],), v)
        return B @ A * (self.alpha / self.r) + S.view(o, i)
