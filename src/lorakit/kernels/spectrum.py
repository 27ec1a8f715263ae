"""The real part of the inverse transform of a sparse spectrum, and its gradient, which is read off the transform of what comes back.

Where the entries are few the gradient gᵀ x of the matrix is not formed: its transform at (u, v) is the sum over tokens of that of g at u times that of
x at v.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lorakit.kernels.products import Product

THIN = 100  # entries of the matrix for one of the spectrum from which on the way without gᵀ x is faster


def grown(o: int, i: int, alpha: float, at: Tensor, of: Tensor, c: Tensor) -> Tensor:
    """alpha Re(ifft2(F)) (o, i) of entries c (n): `at` are their places in half a spectrum, o rows of i // 2 + 1, those of mirror images included; `of`
    tells for each place the entry half of which meets there."""
    F = c.new_zeros(o * (i // 2 + 1)).index_add(0, at, c[of] * (alpha / 2)).unflatten(0, (o, -1))
    return torch.fft.irfft2(F, s=(o, i))


def _pull(o: int, i: int, alpha: float, first: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor]:
    return (torch.fft.rfft2(g).real.flatten()[first] * (alpha / (o * i)),)


def _thin(o: int, i: int, alpha: float, first: Tensor, g: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor]:
    """`_pull` of gᵀ x from g (t, o) and x (t, i), some entries at a time so that what is gathered stays in the cache."""
    row, col = first // (i // 2 + 1), first % (i // 2 + 1)
    G, X = (torch.fft.rfft(z.to(c.dtype)).mT.contiguous() for z in (g, x))  # (o // 2 + 1, t), (i // 2 + 1, t)
    many = max(1, (2**15 if g.device.type == "cpu" else 2**24) // max(1, len(g)))
    pairs = zip(torch.minimum(row, o - row).split(many), col.split(many), strict=True)
    real, imaginary = torch.cat([(torch.view_as_real(G[r]) * torch.view_as_real(X[k])).sum(1) for r, k in pairs]).unbind(1)
    return (torch.where(row > o - row, real + imaginary, real - imaginary) * (alpha / (o * i)),)  # in its upper half G is mirrored


def sparse_spectrum(o: int, i: int, alpha: float, at: Tensor, of: Tensor, first: Tensor) -> Product:
    """c -> `grown`. dc = alpha Re(fft2(dW)) / (o i) at `first`, one place of every entry (n): a mirror image has the same real part."""
    thin = partial(_thin, o, i, alpha, first) if THIN * len(first) <= o * i else None
    return Product(partial(grown, o, i, alpha, at, of), partial(_pull, o, i, alpha, first), thin)
