"""LoTR: low tensor rank weight adaptation. Bershatsky et al., 2024, arXiv 2402.01376.

    W'_l = W_l + s B G_l A,   s = scale / r

A (r, i) and B (o, r) train and are one pair for a group of targets of equal shape, G_l (r, r) trains and is each target's own: the
updates of all layers are one tensor of low Tucker-2 rank, r (i + o) + L r² numbers for L targets. A and B start normal, G at zero, so
W' = W at step 0. The factors have unit variance, so a step's size grows with the width: choose `scale` with care.
"""

from __future__ import annotations

from lorakit.method import Leaf, LowRank, check_rank, choice, method, normal, zeros

GROUPS = ("shape", "name", "model")


def shared_leaves(leaves: dict[str, Leaf], keys: tuple[str, ...], share: str) -> dict[str, Leaf]:
    """A table of leaves in which those of these names are shared among a group of targets; "none": each target has its own."""
    from dataclasses import replace

    return {k: replace(v, shared="" if share == "none" else share) if k in keys else v for k, v in leaves.items()}


@method("lotr", title="LoTR", paper="2402.01376", formula="W + (scale/r) B G A, A and B shared", laws=("rank<=r", "identity"))
class LoTR(LowRank):
    r: int = 8  # rank of the shared pair
    scale: float = 1.0  # strength: the update is scaled by scale / r
    share: str = choice("shape", GROUPS)  # who shares A and B: targets of equal shape; of equal shape and name; all (corners of one pair)

    A = Leaf("r i", normal(1.0), shared="shape")
    B = Leaf("o r", normal(1.0), shared="shape")
    G = Leaf("r r", zeros)

    def __post_init__(self):
        check_rank("lotr", self.r)

    @property
    def leaves(self):
        return shared_leaves(self.own, ("A", "B"), self.share)

    def factors(self, p):
        return p["B"] * (self.scale / self.r), p["G"], p["A"]
