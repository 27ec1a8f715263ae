"""Bat: block affine transformation, the variant of Bone (now MiSS) that reads the weight. Kang and Yin, 2024, arXiv 2409.15371.

    W'[a, c] = W[a, c] + W[a, c] D[a] + D[a]        blocks of r x r; a counts them along the outputs, c along the inputs

D (o/r, r, r) trains and starts at zero, so W' = W at step 0; every block of a row of blocks has the same D. r must divide both sizes. The
update is not of low rank. Where a method stands on another adapter (a chain), W is what that one made.
"""

from __future__ import annotations

from lorakit.method import Additive, Leaf, check_rank, method, zeros


@method("bat", title="Bat", paper="2409.15371", formula="W + W D + D on blocks of r x r", laws=("identity",))
class Bat(Additive):
    reads_base = True

    peft_dropout = "miss_dropout"

    r: int = 64  # size of a block

    D = Leaf("blocks r r", zeros, key="miss_block")

    def __post_init__(self):
        check_rank("bat", self.r)

    @classmethod
    def examples(cls):
        return [cls(4), cls(2), cls(1)]

    def dims(self, o, i):
        return super().dims(o, i) | {"blocks": o // self.r}

    def unfit(self, site):
        if site.out % self.r or site.in_ % self.r:
            return f"bat: blocks of {self.r} do not cut a weight of {site.out} x {site.in_}; mend: an r that divides both"
        return None

    def delta(self, p, W):
        D = p["D"][:, None].to(W().dtype)  # (o/r, 1, r, r)
        blocks = W().unflatten(1, (-1, self.r)).unflatten(0, (-1, self.r)).transpose(1, 2)  # (o/r, i/r, r, r)
        return (blocks @ D + D).transpose(1, 2).flatten(2).flatten(0, 1)

    def to_peft(self):
        return {"peft_type": "MISS", "r": self.r, "mini_r": 1, "init_weights": "bat"}

    @classmethod
    def from_peft(cls, config):
        return cls(config.get("r", 64)) if config.get("peft_type") == "MISS" and config.get("init_weights") == "bat" else None
