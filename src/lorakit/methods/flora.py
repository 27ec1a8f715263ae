"""FLoRA: a low-rank core space in every dimension of the weight. Si et al., 2024, arXiv 2405.14739.

    linear:        W' = W + scale · U Gᵀ Vᵀ                            V (i, q), U (o, r), G (q, r)
    convolution:   W' = W + scale · G ×1 V ×2 U ×3 K1 ×4 K2            V (channels, q), K1 (height, k), K2 (width, k), G (q, r, k, k)

All factors train. U, V and K start normal with deviation 1/sqrt(2 · their columns), G at zero, so W' = W at step 0 and G alone has a gradient. A
kernel's dimensions of size 1 have no factor. There is no alpha / r: `scale` is the strength. Other things with this name: a gradient compressor
(2402.03293) and a federated method.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from lorakit.method import Leaf, LowRank, check_rank, method, zeros


def kaiming_sqrt3(shape, method, origin, gen):
    """torch's `kaiming_normal_(a=sqrt(3))`: a normal with deviation 1/sqrt(2 · columns)."""
    return torch.randn(shape, generator=gen) * (2 * shape[-1]) ** -0.5


@method("flora", title="FLoRA", paper="2405.14739", formula="W + scale · G ×1 V ×2 U (×3 K1 ×4 K2)", laws=("rank<=r", "identity"))
class FLoRA(LowRank):
    r: int = 8  # rank in the outputs
    r_in: int = 0  # rank in the inputs; 0: r
    r_kernel: int = 2  # rank in each dimension of a kernel
    scale: float = 4.0  # strength
    split: bool = True  # a convolution's kernel has factors of its own; false: it counts as part of the inputs
    kernel: tuple = ()  # the sizes of those dimensions; filled in from each convolution

    U = Leaf("o r", kaiming_sqrt3)
    V = Leaf("c q", kaiming_sqrt3)
    G = Leaf("q r", zeros)

    def __post_init__(self):
        check_rank("flora", self.r)
        check_rank("flora (kernel)", self.r_kernel)
        object.__setattr__(self, "kernel", tuple(self.kernel))

    @classmethod
    def examples(cls):
        return [cls(3, 2, 1, 0.8, False), cls(2, 0, 3, 0.7)]

    @property
    def leaves(self):
        modes = range(1, len(self.kernel) + 1)
        core = {"G": dataclasses.replace(self.own["G"], axes=" ".join(["q r", *(f"k{n}" for n in modes)]))}
        return self.own | core | {f"K{n}": Leaf(f"s{n} k{n}", kaiming_sqrt3) for n in modes}

    def dims(self, o, i):
        d = super().dims(o, i) | {"c": i // math.prod(self.kernel), "q": self.r_in or self.r}
        for n, size in enumerate(self.kernel, 1):
            d |= {f"s{n}": size, f"k{n}": min(self.r_kernel, size)}
        return d

    def on(self, site):
        here = tuple(n for n in site.raw[1:] if n > 1) if site.slides and self.split else ()
        return self if self.kernel else dataclasses.replace(self, kernel=here)

    def unfit(self, site):
        here = tuple(n for n in site.raw[1:] if n > 1) if site.slides else ()
        return None if self.kernel in ((), here) else f"flora: its kernel {self.kernel} does not fit the layer's, {here}; mend: leave `kernel` out"

    def factors(self, p):
        T = p["G"].movedim(0, -1) @ p["V"].mT  # (r, k…, c)
        for n in range(1, len(self.kernel) + 1):
            T = T.movedim(1, -1) @ p[f"K{n}"].mT  # each takes the first k that is left, and puts its size last
        return p["U"] * self.scale, T.flatten(1)

    def to_dict(self):
        return super().to_dict() | {"kernel": list(self.kernel)}
