"""MiSS (before: Bone): matrix shard sharing. Kang and Yin, 2024, arXiv 2409.15371.

    W' = W + Dᵀ S,   S[k, j] = 1 where j mod r = k, else 0

D (r, o) trains; S (r, i) is fixed and never stored. D starts at zero, so W' = W at step 0. The input's shards are interleaved: it is cut into
pieces of r neighbours (the last one padded with zeros), which are summed and meet D once. With `mini_r` D is (r, mini_r) and repeats
along the outputs. There is no alpha. It is exactly a LoRA with A = S frozen, and goes out as one on demand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lorakit.method import Leaf, LowRank, check_rank, method, sizes, zeros


@method("miss", title="MiSS", paper="2409.15371", formula="W + Dᵀ S, S the sum over shards", laws=("rank<=r", "identity"), aliases=("bone",))
class MiSS(LowRank):
    peft_dropout = "miss_dropout"

    r: int = 64  # rank: the size of a shard
    mini_r: int = 0  # D has this many columns and repeats along the outputs; 0: a column for every output

    sizes = sizes()

    @property
    def leaves(self):
        return {"D": Leaf("r mini_r" if self.mini_r else "r o", zeros, key="miss_block")} | self.own

    def __post_init__(self):
        check_rank("miss", self.r)

    @classmethod
    def examples(cls):
        return [cls(5), cls(3, 2), cls(1, 4)]

    def unfit(self, site):
        if self.mini_r and site.out % self.mini_r:
            return f"miss: mini_r={self.mini_r} does not divide the {site.out} outputs; mend: one that does, or 0"
        return f"miss: r={self.r} does not fit {site.in_} inputs; mend: at most {site.in_}" if self.r > site.in_ else None

    def factors(self, p):
        o, i = p["sizes"].shape[-2:]
        at = torch.arange(i, device=p["D"].device) % self.r
        S = (at == torch.arange(self.r, device=at.device)[:, None]).to(p["D"].dtype)
        return p["D"].repeat(1, o // p["D"].shape[-1]).mT, S

    def update(self, p, x, f, site, drop):
        if site.lookup or site.slides or site.stack:
            return super().update(p, x, f, site, drop)
        x, more = drop(x), -x.shape[-1] % self.r
        h = (F.pad(x, (0, more)) if more else x).unflatten(-1, (-1, self.r)).sum(-2)
        y = h @ p["D"].to(h.dtype)
        return y.repeat(*[1] * (y.dim() - 1), site.out // y.shape[-1]) if self.mini_r else y

    def to_peft(self):
        return {"peft_type": "MISS", "r": self.r, "mini_r": self.mini_r or 1, "init_weights": "mini" if self.mini_r else True}

    @classmethod
    def from_peft(cls, config):
        if config.get("peft_type") != "MISS" or config.get("init_weights", True) not in (True, False, "mini"):
            return None
        return cls(config.get("r", 64), config.get("mini_r", 1) if config.get("init_weights") == "mini" else 0)
