"""LoKr: low-rank Kronecker product. LyCORIS, Yeh et al., 2023, arXiv 2309.14859; after KronA, arXiv 2212.10650.

    W' = W + s (W1 ⊗ W2),   s = alpha / r
    W1 (l, m):        full, or w1_a (l, r) w1_b (r, m)
    W2 (k, n p):      full, or w2_a (k, r) w2_b (r, n p), or with `tucker`  W2[a, c p] = sum_jq t[j, q, p] w2_a[j, a] w2_b[q, c]

o = l k and the channels m n are cut by `factorization`, the smaller parts first; p pixels of a convolution's kernel stay with W2, 1 elsewhere.
W2 is a product where r < max(k, n) / 2, else full; so is W1 with `decompose_both`. `tucker` (PEFT's use_effective_conv2d) is for kernels of more than one
pixel: w2_a (r, k), w2_b (r, n), t (r, r, p). One factor starts at zero, so W' = W at step 0: W1 (PEFT) or W2 (LyCORIS). On a linear layer the Kronecker
product is never formed, and nothing but the factors is kept for the backward pass. `swapped` is W2 ⊗ W1 over the channels, which is what PEFT makes
of a full W2 on a Conv1d. Where both factors are full LyCORIS has s = 1; here, as in PEFT, it is alpha / r.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import torch

from lorakit.errors import LorakitError
from lorakit.kernels.kronecker import kronecker
from lorakit.kernels.products import cored
from lorakit.method import Leaf, check_rank, choice, kaiming, method, zeros
from lorakit.methods.loha import STARTS, Lycoris, by_start


@lru_cache(maxsize=1024)
def factorization(d: int, factor: int = -1) -> tuple[int, int]:
    """(factor, d / factor) where that divides; else the divisors of d nearest to its root, the first at most `factor` (-1: no bound)."""
    if factor > 0 and d % factor == 0:
        return factor, d // factor
    bound = d if factor == -1 else factor
    m = max(c for c in range(1, int(d**0.5) + 1) if d % c == 0 and c <= max(bound, 1))
    return m, d // m


@method("lokr", title="LoKr", paper="2309.14859", formula="W + (alpha/r) W1 ⊗ W2",
        laws=("rank<=min(l, m, r + full1 * l) * min(k, np, r + full2 * k)", "identity"))
class LoKr(Lycoris):
    beside = {"w2_a": "rank k", "w2_b": "rank n"}

    r: int = 8  # rank of a factor that is a product; a factor that would not be smaller is full
    alpha: float = 8.0  # strength: the update is scaled by alpha / r
    decompose_factor: int = -1  # the first part of both sizes, where it divides them; -1: the divisor nearest to the root
    decompose_both: bool = False  # W1 may be a product, too
    begin: str = choice("peft", STARTS)  # what starts at zero: W1 (peft) or W2 (lycoris)
    tucker: bool = False  # on convolutions with a kernel: W2, where it is a product, has a core
    kernel: int = 0  # pixels of the layer's kernel; filled in from each convolution
    swapped: bool = False  # W2 ⊗ W1 over the channels

    w1 = Leaf("l m", by_start(zeros, kaiming), key="lokr_w1", only="full1")
    w1_a = Leaf("l r", by_start(zeros, kaiming), key="lokr_w1_a", only="low1")
    w1_b = Leaf("r m", kaiming, key="lokr_w1_b", only="low1")
    w2 = Leaf("k np", by_start(kaiming, zeros), key="lokr_w2", only="full2")
    w2_a = Leaf("k rank", kaiming, key="lokr_w2_a", only="low2")
    w2_b = Leaf("r np", by_start(kaiming, zeros), key="lokr_w2_b", only="low2")
    t2 = Leaf("rank rp", kaiming, key="lokr_t2", only="core")

    def __post_init__(self):
        check_rank("lokr", self.r)
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise LorakitError(f"lokr: decompose_factor is at least 1, or -1 for the divisor nearest to the root, not {self.decompose_factor}")

    @classmethod
    def examples(cls):
        return [cls(2, 3.0), cls(1, 0.8, -1, True, "lycoris", True), cls(1, 2.0, 2, swapped=True)]

    def dims(self, o, i):
        pixels = max(self.kernel, 1)
        (l, k), (m, n) = (factorization(d, self.decompose_factor) for d in (o, i // pixels))
        low1, low2 = self.decompose_both and self.r < max(l, m) / 2, self.r < max(k, n) / 2
        d = super().dims(o, i)
        return d | {"l": l, "m": m, "k": k, "n": n, "np": n * pixels, "low1": int(low1), "full1": int(not low1), "low2": int(low2),
                    "full2": int(not low2), "core": d["core"] * low2}

    def parts(self, p):
        """s W1 (l, m), and W2 (k, n p) or its factors (k, r) and (r, n p)."""
        W1 = (p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]) * self.s
        if "w2" in p:
            return W1, p["w2"]
        return (W1, p["w2_a"].mT, cored(p["t2"], p["w2_b"])) if "t2" in p else (W1, p["w2_a"], p["w2_b"])

    def delta(self, p, W):
        W1, *W2 = self.parts(p)
        D = torch.kron(W1, W2[0] if len(W2) == 1 else W2[0] @ W2[1])
        if not self.swapped:
            return D
        sizes = len(W1), W2[0].shape[0], W1.shape[1], -1, max(self.kernel, 1)  # l, k, m, n, p
        return D.view(sizes).permute(1, 0, 3, 2, 4).reshape(D.shape)

    def update(self, p, x, f, site, drop):
        if site.lookup or site.slides or self.swapped:
            return super().update(p, x, f, site, drop)
        return kronecker(x, *self.parts(p), drop=drop)

    def layout(self, leaf, site):
        return (*self.shapes(site.out, site.in_)["w2"][:1], -1, *site.raw[1:]) if leaf == "w2" and self.kernel else super().layout(leaf, site)

    def to_peft(self):
        return super().to_peft() | {"decompose_both": self.decompose_both, "decompose_factor": self.decompose_factor, "rank_dropout_scale": False,
                                    "init_weights": "lycoris" if self.begin == "lycoris" else True}

    @classmethod
    def from_peft(cls, config):
        if config.get("peft_type") != "LOKR":
            return None
        return cls(config.get("r", 8), float(config.get("alpha", 8)), config.get("decompose_factor", -1), bool(config.get("decompose_both")),
                   "lycoris" if config.get("init_weights") == "lycoris" else "peft", bool(config.get("use_effective_conv2d")))

    def at_peft(self, config, shapes):
        return dataclasses.replace(self, swapped=len(shapes.get("w2", ())) == 3)

    def on_peft(self, site):
        conv1d = site.slides and site.n == 1
        return bool(self.kernel) == site.slides and self.swapped == (conv1d and "w2" in self.shapes(site.out, site.in_))
