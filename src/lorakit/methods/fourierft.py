"""FourierFT: a sparse spectrum. Gao et al., 2024, arXiv 2405.03003.

    W' = W + alpha Re(ifft2(F)),   F (o, i) zero but for n entries c at random places

c trains; the places are those of the first n of a random permutation drawn on the CPU with `random_loc_seed`, as in PEFT, so equal layers have equal
places and a file holds c alone. Normal c changes the model at step 0 (PEFT's default); begin="zeros" does not. Of F and its mirror
image only the sum matters. The update is a product of n cosines and n sines, cos(a + b) = cos a cos b - sin a sin b: that way is taken
where n is small, else one real transform of half a spectrum, in at least float32, whose result joins the base's weight for one product where they are of
one precision, and is made again for the backward pass.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

from lorakit.errors import LorakitError
from lorakit.kernels.beside import merged, takes
from lorakit.kernels.products import Product, made, through
from lorakit.kernels.spectrum import sparse_spectrum
from lorakit.kernels.tensor_train import pays
from lorakit.maps import same
from lorakit.method import Additive, Leaf, choice, method, sizes


@lru_cache(maxsize=256)
def drawn(o: int, i: int, n: int, seed: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    def draw():
        at = torch.randperm(o * i, generator=torch.Generator().manual_seed(seed))[:n]
        u, v = at // i, at % i
        row, col, of = torch.cat([u, -u % o]), torch.cat([v, -v % i]), torch.arange(n).repeat(2)
        half, place = col <= i // 2, row * (i // 2 + 1) + col
        return tuple(t.to(device) for t in (u, v, place[half], of[half], torch.where(half[:n], place[:n], place[n:])))

    with ThreadPoolExecutor(1) as other:  # a thread of its own, where no vmap, inference mode or tracing is in force: the result is kept
        return other.submit(draw).result()


@torch.compiler.assume_constant_result
def places(*which) -> tuple[torch.Tensor, ...]:
    """Row and column of every entry (n), as PEFT draws them; where in half a spectrum, o rows of i // 2 + 1, which entries meet; one such place of each."""
    return drawn(*which)


def spectrum(shape, method, origin, gen):
    return torch.zeros(shape) if method.begin == "zeros" else torch.randn(shape, generator=gen)


@method("fourierft", title="FourierFT", paper="2405.03003", formula="W + alpha Re(ifft2(F)), F sparse", laws=("rank<=min(2 * n_frequency, o, i)", "identity"))
class FourierFT(Additive):
    anchor = "(?!)|^"  # PEFT puts `.*\\.` before a key, which a whole path must get rid of
    varies = {"n_frequency_pattern": ("n_frequency", "n_frequency")}
    peft_layers = ("linear", "transposed")

    n_frequency: int = 1000  # how many entries of the spectrum train
    alpha: float = 150.0  # strength (PEFT's scaling); one number of c moves W by at most alpha / (o i)
    random_loc_seed: int = 777  # the seed of the places
    begin: str = choice("normal", ("normal", "zeros"))  # where c starts; normal changes the model at step 0

    c = Leaf("n_frequency", spectrum, key="fourierft_spectrum")
    sizes = sizes()

    def __post_init__(self):
        if self.n_frequency < 1:
            raise LorakitError(f"fourierft: n_frequency is at least 1, not {self.n_frequency}")

    @classmethod
    def examples(cls):
        return [cls(40, 60.0, 5, "zeros"), cls(7, 40.0), cls(1, 90.0, 3)]

    @property
    def laws(self):
        return self.card.laws if self.begin == "zeros" else self.card.laws[:1]

    def unfit(self, site):
        n, most = self.n_frequency, site.out * site.in_
        return f"fourierft: n_frequency={n} is more than the {most} entries of the weight; mend: at most {most}" if n > most else None

    def at(self, p):
        return places(*p["sizes"].shape[-2:], self.n_frequency, self.random_loc_seed, p["c"].device)

    def thin(self, p) -> bool:
        return pays(4 * self.n_frequency, *p["sizes"].shape[-2:])  # of rank 2 n, and twice that for making the tables

    def two(self, p):
        o, i = p["sizes"].shape[-2:]
        if not self.thin(p):
            return None
        u, v, *_ = self.at(p)
        c = p["c"] * (self.alpha / (o * i))
        a = (torch.arange(o, device=c.device)[:, None] * u % o).to(c.dtype) * (2 * math.pi / o)  # (o, n)
        b = (v[:, None] * torch.arange(i, device=c.device) % i).to(c.dtype) * (2 * math.pi / i)  # (n, i)
        return torch.cat([a.cos() * c, -a.sin() * c], 1), torch.cat([b.cos(), b.sin()])

    def delta(self, p, W):
        return made(self.product(p), p["c"])

    def product(self, p) -> Product:
        return sparse_spectrum(*p["sizes"].shape[-2:], self.alpha, *self.at(p)[2:])

    def act(self, p, x, f, site, drop):
        base = f.product() if drop is same and not self.thin(p) else None
        if base and x.dtype.itemsize >= 4 and takes(x, base[0]):  # in less the update would drown in the base
            return merged(x, *base, self.product(p), p["c"])
        return super().act(p, x, f, site, drop)

    def update(self, p, x, f, site, drop):
        if site.slides or site.lookup or site.stack or self.thin(p):
            return super().update(p, x, f, site, drop)
        return through(self.product(p), x, p["c"], drop=drop)

    def to_peft(self):
        return {"peft_type": "FOURIERFT", "n_frequency": self.n_frequency, "scaling": self.alpha, "random_loc_seed": self.random_loc_seed,
                "fan_in_fan_out": False, "init_weights": self.begin == "zeros"}

    @classmethod
    def from_peft(cls, config):
        if config.get("peft_type") != "FOURIERFT":
            return None
        return cls(config.get("n_frequency", 1000), float(config.get("scaling", 150.0)), config.get("random_loc_seed", 777),
                   "zeros" if config.get("init_weights") else "normal")
