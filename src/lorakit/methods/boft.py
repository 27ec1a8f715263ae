"""BOFT: orthogonal fine-tuning by butterfly factors. Liu et al., 2023, arXiv 2311.06243.

    y = m · ((x R) Wᵀ), so W' = diag(m) W Rᵀ,   R = B_c … B_1,   B_k = P_k blockdiag(R_k1 … R_kn) P_kᵀ

R_kj = (I - S)(I + S)⁻¹ with S = (Z - Zᵀ) / 2. Z (c, n, b, b) and the gain m (o) of every output (s in the paper) train; they start at
zero and one, so W' = W at step 0. The permutation P_k interleaves the halves of 2^(k-1) neighbouring blocks, so that c factors of small blocks make
a rotation that reaches b 2^(c-1) coordinates; it is a matter of views, no matrix and no index. The bias is not scaled. PEFT quietly works
with one factor wherever its CUDA extension is not built, and then cannot load a file with more.
"""

from __future__ import annotations

import dataclasses

from lorakit.errors import LorakitError
from lorakit.kernels.cayley import cayley, turn
from lorakit.method import Leaf, choice, method, ones, zeros
from lorakit.methods.oft import SIDES, Rotation, square


def shuffle(x, k: int, half: int, back: bool):
    """x P_k, or x P_kᵀ: the even and the odd half blocks of every 2^k blocks side by side, for x (…, size)."""
    parts = (2**k, 2) if back else (2, 2**k)
    return x.unflatten(-1, (-1, *parts, half)).transpose(-3, -2).flatten(-4)


@method("boft", title="BOFT", paper="2311.06243", formula="diag(m) W Rᵀ, R a product of butterfly factors", laws=("row_angles", "identity"))
class BOFT(Rotation):
    peft_layers = ("linear", "conv2d")

    block_size: int = 0  # size of a block; 0: 4, or what r says
    r: int = 0  # number of blocks, instead of their size
    factors: int = 1  # number of butterfly factors
    side: str = choice("in", SIDES)  # what is turned: the layer's inputs or its outputs; m scales the outputs either way

    Z = Leaf("factors n b b", zeros, key="boft_R")
    m = Leaf("o one", ones, key="boft_s")

    def __post_init__(self):
        if (self.block_size and self.r) or min(self.block_size, self.r) < 0 or self.factors < 1 or self.block_size == 1:
            raise LorakitError(f"boft: give the size of a block, at least 2, or the number r of blocks, not block_size={self.block_size}, r={self.r}; "
                               "factors is at least 1")

    @classmethod
    def examples(cls):
        return [cls(2, factors=2), cls(r=2, side="out")]

    @property
    def laws(self):
        return self.card.laws if self.side == "in" else ("identity",)

    def dims(self, o, i):
        size = self.size(o, i)
        b = size // self.r if self.r else self.block_size or 4
        return super().dims(o, i) | {"b": b, "n": size // max(b, 1), "one": 1}

    def unfit(self, site):
        size = self.size(site.out, site.in_)
        d = self.dims(site.out, site.in_)
        b, reach = d["b"], d["b"] * 2 ** (self.factors - 1)
        if b < 2 or (self.r and self.r * b != size) or size % reach or (self.factors > 1 and b % 2):
            return (f"boft does not fit: {size} coordinates cannot be cut into {self.r or size // b} blocks for {self.factors} butterfly factors; "
                    f"mend: a block_size (even where factors > 1) such that block_size · 2^(factors-1) divides {size}")
        return super().unfit(site)

    def turned(self, p, x, back=False):
        Z = p["Z"]
        R = cayley((Z - Z.mT) / 2)
        half = Z.shape[-1] // 2
        for k in range(self.factors) if back else reversed(range(self.factors)):
            if k:
                x = shuffle(x, k, half, False)
            x = turn(x, R[k].mT if back else R[k])
            if k:
                x = shuffle(x, k, half, True)
        return x

    def weight(self, p, W):
        return p["m"].to(W.dtype) * super().weight(p, W)

    def row_norm(self, p, f):
        return p["m"].flatten().abs() * f.row_sq().sqrt() if self.side == "in" else super().row_norm(p, f)

    def act(self, p, x, f, site, drop):
        if site.slides:
            return super().act(p, x, f, site, drop)
        y = super().act(p, x, f, site, drop)
        return site.scale(y, p["m"].flatten().to(y.dtype), last=True)

    def from_file(self, shapes):
        return dataclasses.replace(self, factors=shapes["Z"][0], block_size=shapes["Z"][2], r=0)

    def to_peft(self):
        if self.side == "out":
            return None
        size = 0 if self.r else self.block_size or 4
        return {"peft_type": "BOFT", "boft_block_size": size, "boft_block_num": self.r, "boft_n_butterfly_factor": self.factors,
                "boft_dropout": 0.0, "fan_in_fan_out": False, "init_weights": True}

    @classmethod
    def from_peft(cls, config):
        if config.get("peft_type") != "BOFT":
            return None
        return cls(config.get("boft_block_size", 4), config.get("boft_block_num", 0), config.get("boft_n_butterfly_factor", 1))

    def layout(self, leaf, site):
        return (1, site.out) if leaf == "m" and site.slides else None

    def on_peft(self, site):
        return self.factors == 1 and square(site)

    def at_peft(self, config, shapes):
        return dataclasses.replace(self, factors=shapes["Z"][0])  # without its CUDA extension PEFT makes one factor, whatever the configuration says
