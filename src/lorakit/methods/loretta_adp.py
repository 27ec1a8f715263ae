"""LoRETTA_adp: a serial bottleneck whose two matrices are tensor trains. Yang et al., 2024, arXiv 2402.11417.

    y' = y + scale (U act(D y + d) + u),   D = TT(d1 … dK) read as (width, o),   U = TT(u1 … uK) read as (o, width)

Each matrix is one tensor train of its o · width numbers in row-major order: K cores (t, n_k, t) of inner rank `tensor_rank`, the sizes
n_k made from the number itself (the official tables have wrong rows). Cores start normal such that an entry of the product has variance 1/o
(the authors: 1/(o + width)); U's last core starts at zero ("zero", the base's output exactly) or so as well ("normal"). Put on
`block-outputs` like Houlsby's adapters; the layer norms train beside it in the paper. Not linear, so it does not merge.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lorakit.kernels.tensor_train import contract, modes
from lorakit.method import Leaf, Serial, check_rank, choice, method, zeros
from lorakit.methods.bottleneck import ACTS


def core(shape, method, origin, gen):
    """Normal; the product of all cores has entries of variance 1/o."""
    return torch.randn(shape, generator=gen) * (method.width ** (1 / method.modes) / (shape[1] * shape[2])) ** 0.5


def last_core(shape, method, origin, gen):
    return (zeros if method.start_at == "zero" else core)(shape, method, origin, gen)


@method("loretta-adp", title="LoRETTA, serial", paper="2402.11417", formula="y + scale (U act(D y + d) + u), U and D tensor trains", laws=("identity",),
        aliases=("loretta_adp",))
class LoRETTAAdp(Serial):
    width: int = 64  # of the bottleneck
    tensor_rank: int = 5  # inner rank of both trains
    modes: int = 5  # cores of a train
    scale: float = 1.0
    act_fn: str = choice("relu", ACTS)  # the non-linearity
    start_at: str = choice("zero", ("zero", "normal"))  # zero: exactly the base; normal: the official random cores

    d = Leaf("width", zeros)
    u = Leaf("o", zeros)

    def __post_init__(self):
        for name in ("width", "tensor_rank", "modes"):
            check_rank(f"loretta-adp ({name})", getattr(self, name))

    @classmethod
    def examples(cls):
        return [cls(4, 3, 3, 0.7, "tanh"), cls(3, 2, 2, 1.3, "silu", "normal")]

    @property
    def laws(self):
        return self.card.laws if self.start_at == "zero" else ()

    @property
    def leaves(self):
        K, ends = self.modes, ["one", *["tensor_rank"] * (self.modes - 1), "one"]
        trains = {f"{f}{k + 1}": Leaf(f"{ends[k]} n{k + 1} {ends[k + 1]}", last_core if (f, k) == ("u", K - 1) else core) for f in "du" for k in range(K)}
        return self.own | trains

    def dims(self, o, i):
        return super().dims(o, i) | {"one": 1} | {f"n{k}": n for k, n in enumerate(modes(o * self.width, self.modes), 1)}

    def matrices(self, p):
        D, U = (contract([p[f"{f}{k}"] for k in range(1, self.modes + 1)]) for f in "du")
        return D.view(self.width, -1), U.view(-1, self.width)

    def after(self, p, y, site, drop):
        D, U = (M.to(y.dtype) for M in self.matrices(p))
        h = ACTS[self.act_fn](F.linear(drop(y.movedim(site.channel, -1)), D, p["d"].to(y.dtype)))
        return F.linear(h, U, p["u"].to(y.dtype)).movedim(-1, site.channel) * self.scale

    def size(self, p):
        D, U = self.matrices(p)
        return self.scale * (U.norm() * D.norm() + p["u"].norm())
