"""LoKr: low-rank Kronecker product. LyCORIS, Yeh et al., 2023, arXiv 2309.14859; after KronA, arXiv 2212.10650.

    W' = W + s (W1 ⊗ W2),   s = alpha / r

W1 (l, m) and W2 (k, n) train; o = l k and i = m n are cut by `factorization`, the smaller parts first. W2 is a product w2_a (k, r)
w2_b (r, n) where r < max(k, n) / 2, else full; so is W1 with `decompose_both`. One factor starts at zero, so W' = W at step 0: W1 (PEFT)
or W2 (LyCORIS). The Kronecker product is never formed on a linear layer. On a convolution i is cut as a whole, kernel included, which
for kernels of more than one pixel is another cut than PEFT's; PEFT's own Conv1d scrambles the product, this is the true one.
Where both factors are full LyCORIS has s = 1; here, as in PEFT, it is alpha / r.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from lorakit.errors import LorakitError
from lorakit.method import Additive, Leaf, check_rank, choice, kaiming, method, refuse, zeros
from lorakit.methods.loha import STARTS, by_start


@lru_cache(maxsize=1024)
def factorization(d: int, factor: int = -1) -> tuple[int, int]:
    """(factor, d / factor) where that divides; else the divisors of d nearest to its root, the first at most `factor` (-1: no bound)."""
    if factor > 0 and d % factor == 0:
        return factor, d // factor
    bound = d if factor == -1 else factor
    m = max(c for c in range(1, int(d**0.5) + 1) if d % c == 0 and c <= max(bound, 1))
    return m, d // m


@method("lokr", title="LoKr", paper="2309.14859", formula="W + (alpha/r) W1 ⊗ W2",
        laws=("rank<=min(l, m, r + full1 * l) * min(k, n, r + full2 * k)", "identity"))
class LoKr(Additive):
    varies = {"rank_pattern": ("r", "r"), "alpha_pattern": ("alpha", "alpha")}

    r: int = 8  # rank of a factor that is a product; a factor that would not be smaller is full
    alpha: float = 8.0  # strength: the update is scaled by alpha / r
    decompose_factor: int = -1  # the first part of both sizes, where it divides them; -1: the divisor nearest to the root
    decompose_both: bool = False  # W1 may be a product, too
    begin: str = choice("peft", STARTS)  # what starts at zero: W1 (peft) or W2 (lycoris)

    w1 = Leaf("l m", by_start(zeros, kaiming), key="lokr_w1", only="full1")
    w1_a = Leaf("l r", by_start(zeros, kaiming), key="lokr_w1_a", only="low1")
    w1_b = Leaf("r m", kaiming, key="lokr_w1_b", only="low1")
    w2 = Leaf("k n", by_start(kaiming, zeros), key="lokr_w2", only="full2")
    w2_a = Leaf("k rank", kaiming, key="lokr_w2_a", only="low2")
    w2_b = Leaf("r n", by_start(kaiming, zeros), key="lokr_w2_b", only="low2")

    def __post_init__(self):
        check_rank("lokr", self.r)
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise LorakitError(f"lokr: decompose_factor is at least 1, or -1 for the divisor nearest to the root, not {self.decompose_factor}")

    @classmethod
    def examples(cls):
        return [cls(2, 3.0), cls(1, 0.8, -1, True, "lycoris"), cls(1, 2.0, 2)]

    def dims(self, o, i):
        (l, k), (m, n) = (factorization(d, self.decompose_factor) for d in (o, i))
        low1, low2 = self.decompose_both and self.r < max(l, m) / 2, self.r < max(k, n) / 2
        return super().dims(o, i) | {"l": l, "m": m, "k": k, "n": n, "rank": self.r,
                                     "low1": int(low1), "full1": int(not low1), "low2": int(low2), "full2": int(not low2)}

    def parts(self, p):
        return p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"], (p["w2"],) if "w2" in p else (p["w2_a"], p["w2_b"])

    def delta(self, p, W):
        W1, W2 = self.parts(p)
        return torch.kron(W1, W2[0] if len(W2) == 1 else W2[0] @ W2[1]) * (self.alpha / self.r)

    def update(self, p, x, f, site, drop):
        if site.lookup or site.slides or site.stack:
            return super().update(p, x, f, site, drop)
        W1, W2 = self.parts(p)
        h = drop(x).unflatten(-1, (W1.shape[1], -1))  # (…, m, n)
        for F in reversed(W2):
            h = h @ F.to(x.dtype).mT
        return ((W1 * (self.alpha / self.r)).to(x.dtype) @ h).flatten(-2)

    def to_peft(self):
        return {"peft_type": "LOKR", "r": self.r, "alpha": self.alpha, "rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False,
                "decompose_both": self.decompose_both, "decompose_factor": self.decompose_factor, "rank_dropout_scale": False,
                "init_weights": "lycoris" if self.begin == "lycoris" else True}

    @classmethod
    def from_peft(cls, config):
        if config.get("peft_type") != "LOKR":
            return None
        refuse(config, use_effective_conv2d=False)
        return cls(config.get("r", 8), float(config.get("alpha", 8)), config.get("decompose_factor", -1), bool(config.get("decompose_both")),
                   "lycoris" if config.get("init_weights") == "lycoris" else "peft")
