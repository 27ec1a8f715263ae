"""HRA: Householder reflection adaptation. Yuan et al., 2024, arXiv 2405.17484.

    W' = W H,   H = (I - 2 u_1 u_1ᵀ) … (I - 2 u_r u_rᵀ) = I - U T Uᵀ

u_k are the columns of U (i, r), which trains, brought to length one. The product of r reflections costs two thin products and an (r, r)
triangular inverse T (compact WY form): no (i, i) matrix is made. Two equal reflections undo each other, so U starts with pairs of equal
columns and W' = W at step 0. An odd number of reflections has determinant -1: no start of it leaves the model as it is, so an odd r needs start
"random", which changes the model at step 0. So does `gram_schmidt`, which makes the columns orthogonal first (H = I - 2 U Uᵀ, never I): pairs of equal
columns would be rounding noise there, so it starts from random columns, too.
"""

from __future__ import annotations

import dataclasses

import torch

from lorakit.errors import LorakitError
from lorakit.method import Leaf, check_rank, choice, method
from lorakit.methods.oft import SIDES, Rotation, square


def pairs(shape, method, origin, gen):
    """Uniform columns, each twice where the start is symmetric."""
    twice = 2 if method.start_is_even else 1
    half = (torch.rand(shape[0], shape[1] // twice, generator=gen) * 2 - 1) * (shape[1] // twice) ** -0.5
    return half.repeat_interleave(twice, 1)


@method("hra", title="HRA", paper="2405.17484", formula="W (I - 2 u_1 u_1ᵀ) … (I - 2 u_r u_rᵀ)", laws=("orthogonal", "rank<=r", "row_angles", "identity"))
class HRA(Rotation):
    peft_layers = ("linear", "conv2d")

    r: int = 8  # number of reflections
    gram_schmidt: bool = False  # the reflections are made orthogonal to each other (PEFT's apply_GS); changes the model at step 0
    begin: str = choice("symmetric", ("symmetric", "random"))  # pairs that undo each other (r even), or any columns: changes the model at step 0
    side: str = choice("in", SIDES)  # what is reflected: the layer's inputs or its outputs

    U = Leaf("size r", pairs, key="hra_u")

    def __post_init__(self):
        check_rank("hra", self.r)
        if self.r % 2 and self.begin == "symmetric" and not self.gram_schmidt:
            raise LorakitError(f"hra: {self.r} reflections cannot undo each other, so the model would change at step 0; mend: an even r, or begin=\"random\"")

    @classmethod
    def examples(cls):
        return [cls(4), cls(3, begin="random", side="out"), cls(2, gram_schmidt=True)]

    @property
    def start_is_even(self) -> bool:
        return self.begin == "symmetric" and not self.gram_schmidt

    @property
    def laws(self):
        return tuple(k for k in self.card.laws if (k != "identity" or self.start_is_even) and (k != "row_angles" or self.side == "in"))

    def dims(self, o, i):
        return super().dims(o, i) | {"size": self.size(o, i)}

    def unfit(self, site):
        size = self.size(site.out, site.in_)
        if self.gram_schmidt and self.r > size:
            return f"hra does not fit: {self.r} reflections cannot be orthogonal in {size} coordinates; mend: r of at most {size}"
        return super().unfit(site)

    def turned(self, p, x, back=False):  # y = x Hᵀ W0ᵀ, so that R = Hᵀ
        U = p["U"]
        one = torch.eye(self.r, dtype=U.dtype, device=U.device)
        with torch.autocast(U.device.type, enabled=False):
            if self.gram_schmidt:
                U, T = torch.linalg.qr(U)[0], 2 * one
            else:
                U = U / U.norm(dim=0)
                T = torch.linalg.solve_triangular((U.mT @ U).triu(1) + one / 2, one, upper=True)
        U, T = U.to(x.dtype), (T if back else T.mT).to(x.dtype)
        return x - ((x @ U) @ T) @ U.mT

    def from_file(self, shapes):
        return dataclasses.replace(self, r=shapes["U"][1])

    def to_peft(self):
        return {"peft_type": "HRA", "r": self.r, "apply_GS": self.gram_schmidt, "init_weights": self.begin == "symmetric"} if self.side == "in" else None

    def layout(self, leaf, site):
        return (self.size(site.out, site.in_), self.r) if site.slides else None

    def on_peft(self, site):
        return square(site)

    @classmethod
    def from_peft(cls, config):
        if config.get("peft_type") != "HRA":
            return None
        r, symmetric = config.get("r", 8), config.get("init_weights", True)
        return cls(r, bool(config.get("apply_GS")), "symmetric" if symmetric and r % 2 == 0 else "random")
