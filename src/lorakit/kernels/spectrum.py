"""The real part of the inverse transform of a sparse spectrum, and its gradient, which is read off the transform of what comes back."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lorakit.kernels.products import Product


def grown(o: int, i: int, alpha: float, at: Tensor, of: Tensor, c: Tensor) -> Tensor:
    """alpha Re(ifft2(F)) (o, i) of entries c (n): `at` are their places in half a spectrum, o rows of i // 2 + 1, those of mirror images included; `of`
    tells for each place the entry half of which meets there."""
    F = c.new_zeros(o * (i // 2 + 1)).index_add(0, at, c[of] / 2).unflatten(0, (o, -1))
    return torch.fft.irfft2(F, s=(o, i)) * alpha


def _pull(o: int, i: int, alpha: float, first: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor]:
    return (torch.fft.rfft2(g).real.flatten()[first] * (alpha / (o * i)),)


def sparse_spectrum(o: int, i: int, alpha: float, at: Tensor, of: Tensor, first: Tensor) -> Product:
    """c -> `grown`. dc = alpha Re(fft2(dW)) / (o i) at `first`, one place of every entry (n): a mirror image has the same real part."""
    return Product(partial(grown, o, i, alpha, at, of), partial(_pull, o, i, alpha, first))
