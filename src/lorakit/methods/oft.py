"""OFT: orthogonal fine-tuning. Qiu et al., 2023, arXiv 2306.07280; in the form that turns the input, OFTv2: arXiv 2506.19847.

    y = (x R) Wᵀ, so W' = W Rᵀ,   R = blockdiag(R_1 … R_n),   R_k = (I - Q_k)(I + Q_k)⁻¹

Q_k (b, b) is skew; its b(b-1)/2 numbers above the diagonal train and start at zero, so W' = W at step 0. Angles and norms of W's rows
never change. side "out" turns the outputs instead (W' = Rᵀ W), which is what happens to an embedding: its vectors turn. A block size or a number of blocks
that does not divide the layer's size is moved to the nearest divisor, as in PEFT. COFT (eps) scales Q_k back wherever its norm is above
eps / sqrt(n). With `series` R is PEFT's truncated series instead of the inverse: faster, orthogonal only for small Q, and the other way
round (it tends to the transpose), so the same numbers mean the inverse rotation.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod

from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.kernels.cayley import block_of, cayley, cayley_series, series_of, skew, turn
from lorakit.method import Leaf, Method, Params, choice, method, refuse, zeros

SIDES = ("in", "out")


class Rotation(Method):
    """W' = W Rᵀ (its field `side` is "in") or Rᵀ W ("out") for an orthogonal R that is never formed."""

    @abstractmethod
    def turned(self, p: Params, x: Tensor, back: bool = False) -> Tensor:
        """x R, or x Rᵀ; x (…, size)."""
        ...

    def size(self, o: int, i: int) -> int:
        """How many coordinates are turned."""
        return i if self.side == "in" else o

    def weight(self, p, W):
        return self.turned(p, W, back=True) if self.side == "in" else self.turned(p, W.mT).mT

    def act(self, p, x, f, site, drop):
        if site.slides:
            return super().act(p, x, f, site, drop)
        return f(self.turned(p, x)) if self.side == "in" else self.turned(p, f(x))

    def on(self, site):
        return dataclasses.replace(self, side="out") if site.lookup else self

    def row_norm(self, p, f):
        return f.row_sq().sqrt() if self.side == "in" and "orthogonal" in self.laws else super().row_norm(p, f)

    def unfit(self, site):
        if site.lookup and self.side == "in":
            return f'{self.name} would mix the rows of a table; mend: side="out", which turns the embedding\'s vectors'
        return f"{self.name} needs at least two coordinates to turn" if self.size(site.out, site.in_) < 2 else None


def square(site) -> bool:
    """Whether a convolution is alike in all directions: PEFT looks at the first one only."""
    m = site.module
    return not site.slides or all(len(set(v)) == 1 for v in (m.kernel_size, m.stride, m.padding))


def divisor(n: int, near: int) -> int:
    """The divisor of n nearest to a number, the lower of two that are equally near."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - near), d))


@method("oft", title="OFT", paper="2306.07280", formula="W Rᵀ, R = blockdiag((I - Q)(I + Q)⁻¹)", laws=("orthogonal", "row_angles", "identity"),
        aliases=("oftv2", "oft-v2"))
class OFT(Rotation):
    peft_layers = ("linear", "conv2d")

    block_size: int = 0  # size of a block; 0: 32, or what r says
    r: int = 0  # number of blocks, instead of their size
    block_share: bool = False  # one rotation for all blocks of a layer
    eps: float = 0.0  # COFT: how far the rotation may go; 6e-5, PEFT's default, hardly moves a model; 0: as far as it likes
    series: int = 0  # terms of PEFT's series (its default is 5) instead of the exact inverse; 0: exact
    side: str = choice("in", SIDES)  # what is turned: the layer's inputs or its outputs

    R = Leaf("n e", zeros, key="oft_R.weight", lookup=("oft_embedding_R.weight", zeros))

    def __post_init__(self):
        if (self.block_size and self.r) or min(self.block_size, self.r, self.eps, self.series) < 0 or self.block_size == 1:
            raise LorakitError(f"oft: give the size of a block, at least 2, or the number r of blocks, not block_size={self.block_size}, r={self.r}; "
                               "eps and series are 0 or more")

    @classmethod
    def examples(cls):
        return [cls(4), cls(r=3, block_share=True, eps=0.4), cls(2, series=5, side="out")]

    @property
    def laws(self):
        return ("identity",) if self.series else tuple(k for k in self.card.laws if k != "row_angles" or self.side == "in")

    def block(self, o: int, i: int) -> int:
        size = self.size(o, i)
        return size // divisor(size, self.r) if self.r else divisor(size, self.block_size or 32)

    def dims(self, o, i):
        b = self.block(o, i)
        return super().dims(o, i) | {"n": 1 if self.block_share else self.size(o, i) // b, "e": b * (b - 1) // 2}

    def unfit(self, site):
        if why := super().unfit(site):
            return why
        size, b = self.size(site.out, site.in_), self.block(site.out, site.in_)
        return f"oft does not fit: {size} coordinates in blocks of {b} leave nothing to turn; mend: a block_size that divides {size}" if b < 2 else None

    def turned(self, p, x, back=False):
        R = self.rotation(p["R"])
        return turn(x, R.mT if back else R)

    def rotation(self, v: Tensor) -> Tensor:
        if self.series and not self.eps:
            return series_of(v, self.series)
        Q = skew(v)
        if self.eps:
            bound = self.eps * len(Q) ** -0.5
            Q = Q * (bound / Q.square().sum((-2, -1), keepdim=True).clamp_min(bound**2).sqrt())
        return cayley_series(Q, self.series) if self.series else cayley(Q)

    def from_file(self, shapes):
        return dataclasses.replace(self, block_size=block_of(shapes["R"][1]), r=0)

    def to_peft(self):
        if self.side == "out" or self.eps:
            return None
        return {"peft_type": "OFT", "r": self.r, "oft_block_size": 0 if self.r else self.block_size or 32, "block_share": self.block_share, "coft": False,
                "module_dropout": 0.0, "fan_in_fan_out": False, "init_weights": True, "use_cayley_neumann": self.series > 0,
                "num_cayley_neumann_terms": self.series or 5}

    def on_peft(self, site):  # where patches overlap PEFT turns their sum, which is no convolution any more and not what it merges
        return not site.slides or (set(site.module.kernel_size) == {1} and square(site))

    @classmethod
    def from_peft(cls, config):
        if config.get("peft_type") != "OFT":
            return None
        refuse(config, coft=False)
        terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else 0
        return cls(config.get("oft_block_size", 32), config.get("r", 0), bool(config.get("block_share")), series=terms)
