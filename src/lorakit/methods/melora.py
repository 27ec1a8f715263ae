"""MELoRA: an ensemble of mini low-rank adapters. Ren et al., 2024, arXiv 2402.17263.

    W' = W + s blockdiag(B_1 A_1, …, B_n A_n),   s = alpha / r

A (n, r, i/n) and B (n, o/n, r) train; A_k starts uniform in ±1/sqrt(i/n), B at zero, so W' = W at step 0. It has the parameters of one LoRA of rank
r and up to n times its rank: mini-adapter k reads the k-th part of the input and writes the k-th part of the output. n must divide both (the authors'
code cuts off what is left over). On a fused qkv layer the parts do not fall together with q, k and v, unless n is a multiple of three.
"""

from __future__ import annotations

import torch

from lorakit.method import Leaf, LowRank, check_rank, kaiming, method, zeros


def block_diagonal(T: torch.Tensor) -> torch.Tensor:
    """(n, a, b) -> (n a, n b)."""
    n, a, b = T.shape
    eye = torch.eye(n, dtype=T.dtype, device=T.device)
    return (T[:, :, None, :] * eye[:, None, :, None]).reshape(n * a, n * b)


@method("melora", title="MELoRA", paper="2402.17263", formula="W + s blockdiag(B_1 A_1, …, B_n A_n)", laws=("rank<=n*r", "identity"))
class MELoRA(LowRank):
    r: int = 8  # rank of each mini-adapter
    alpha: float = 16.0  # strength: the update is scaled by alpha / r
    n: int = 2  # how many there are

    A = Leaf("n r m", kaiming)
    B = Leaf("n q r", zeros)

    def __post_init__(self):
        check_rank("melora", self.r)
        check_rank("melora (mini-adapters)", self.n)

    @classmethod
    def examples(cls):
        return [cls(2, 3.0, 4), cls(1, 5.0, 2), cls(3, 4.0, 1)]

    def dims(self, o, i):
        return super().dims(o, i) | {"m": i // self.n, "q": o // self.n}

    def unfit(self, site):
        width = site.raw[0] if site.slides else site.in_  # a convolution is cut between channels, not inside a filter
        return f"melora: {self.n} mini-adapters do not fit {site.out} outputs and {width} inputs; mend: an n that divides both" if (
            site.out % self.n or width % self.n) else None

    def factors(self, p):
        return block_diagonal(p["B"] * (self.alpha / self.r)), block_diagonal(p["A"])

    def update(self, p, x, f, site, drop):
        if site.slides or site.lookup:
            return super().update(p, x, f, site, drop)
        A, B = p["A"].to(x.dtype), p["B"].to(x.dtype) * (self.alpha / self.r)
        parts = drop(x).unflatten(-1, (self.n, -1)).movedim(-2, 0)  # (n, …, i/n)
        y = torch.stack([part @ a.mT @ b.mT for part, a, b in zip(parts, A, B, strict=True)])
        return y.movedim(0, -2).flatten(-2)
