"""Tensor trains and other products: how to contract one, how to cut a size into modes, when a product is worth its factors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor


def pays(rank: int, o: int, i: int) -> bool:
    """Whether factors (o, rank) and (rank, i) are smaller than their product: then they are faster to act with, too."""
    return rank * (o + i) < o * i


def contract(cores: Sequence[Tensor]) -> Tensor:
    """Cores (r_{k-1}, n_k, r_k) with r_0 = r_K = 1 -> all n_1 … n_K entries in row-major order: G_1[:, j_1] … G_K[:, j_K]."""
    first, *rest = cores
    out = first.flatten(0, 1)  # (n_1, r_1)
    for G in rest:
        out = (out @ G.flatten(1)).unflatten(-1, G.shape[1:]).flatten(0, 1)  # (n_1 … n_k, r_k)
    return out.flatten()


@lru_cache(maxsize=1024)
def modes(size: int, n: int) -> tuple[int, ...]:
    """n factors of a size, as equal as its prime factors let them be, ascending: modes(768 * 64, 5) = (8, 8, 8, 8, 12)."""
    primes, rest, d = [], size, 2
    while d * d <= rest:
        while rest % d == 0:
            primes.append(d)
            rest //= d
        d += 1
    primes += [rest] if rest > 1 else []
    out = [1] * n
    for q in sorted(primes, reverse=True):
        out[out.index(min(out))] *= q
    return tuple(sorted(out))
