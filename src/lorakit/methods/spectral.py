"""Spectral Adapter: tuning the top singular directions. Zhang and Pilanci, 2024, arXiv 2405.13952.

    W = U S Vᵀ, and of it the columns U_r (o, r), S_r (r), V_r (i, r) of one block, by default the largest:
    additive:   W' = W + (U_r + X) S_r (V_r + Y)ᵀ - U_r S_r V_rᵀ                        X (o, r), Y (i, r)
    rotation:   W' = W + U_r R_u diag(S_r + c) (V_r R_v)ᵀ - U_r S_r V_rᵀ                R = (I - K)(I + K)⁻¹, K = (Z - Zᵀ) / 2, Z (r, r)

X, Y, or the two Z and, with `gains`, c (r) train; all start at zero, so W' = W at step 0. There is no alpha / r. U_r, S_r and V_r are kept, and
saved, beside them. Adapters with different `index` use different columns, so that they can be added without touching each other's.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.kernels.cayley import cayley
from lorakit.kernels.svd import thin_svd
from lorakit.method import Leaf, LowRank, check_rank, choice, method, zeros


@method("spectral", title="Spectral Adapter", paper="2405.13952", formula="(U_r + X) S_r (V_r + Y)ᵀ + the rest of W", laws=("rank<=2*r", "identity"),
        aliases=("spectral-adapter",))
class Spectral(LowRank):
    r: int = 8  # how many singular directions are tuned
    kind: str = choice("additive", ("additive", "rotation"))  # the directions move freely, or turn among themselves
    gains: bool = False  # the singular values train too (rotation only)
    index: int = 0  # which block of r directions: 0 has the largest singular values

    X = Leaf("o r", zeros)
    Y = Leaf("i r", zeros)
    Zu = Leaf("r r", zeros)
    Zv = Leaf("r r", zeros)
    c = Leaf("r", zeros)
    U = Leaf("o r", zeros, trains=False)
    S = Leaf("r", zeros, trains=False)
    V = Leaf("i r", zeros, trains=False)

    def __post_init__(self):
        check_rank("spectral", self.r)
        if self.index < 0 or (self.gains and self.kind == "additive") or (self.kind == "rotation" and self.r == 1 and not self.gains):
            raise LorakitError("spectral: index is 0 or more, gains belong to kind=\"rotation\", and a single direction cannot turn: it needs gains")

    @classmethod
    def examples(cls):
        return [cls(3, index=1), cls(2, "rotation"), cls(1, "rotation", gains=True), cls(4, "rotation", True)]

    @property
    def leaves(self):
        mine = "XY" if self.kind == "additive" else ("Zu", "Zv")[: 2 * (self.r > 1)] + ("c",)[: self.gains]
        return {k: leaf for k, leaf in self.own.items() if k in mine or not leaf.trains}

    def unfit(self, site):
        have, need = min(site.out, site.in_), (self.index + 1) * self.r
        return (f"spectral does not fit: the layer has {have} singular directions, not the {need} that r={self.r} and index={self.index} ask for; "
                "mend: a smaller r or index") if need > have else None

    def settle(self, p, W):
        block = slice(self.index * self.r, (self.index + 1) * self.r)
        U, S, Vh = thin_svd(W())
        for k, t in (("U", U[:, block]), ("S", S[block]), ("V", Vh[block].mT)):
            p[k].copy_(t)

    def factors(self, p):
        U, S, V = p["U"], p["S"], p["V"]
        if self.kind == "additive":
            return torch.cat([p["X"], U], 1), torch.cat([S, S]), torch.cat([V + p["Y"], p["Y"]], 1).mT
        Ru, Rv = (cayley((p[k] - p[k].mT) / 2) if k in p else torch.eye(self.r, dtype=U.dtype, device=U.device) for k in ("Zu", "Zv"))
        return U, (Ru * (S + p["c"] if self.gains else S)) @ Rv.mT - torch.diag(S), V.mT
