"""What PEFT 0.21's `add_weighted_adapter` computes, under names of its own: `peft-linear`, `peft-ties-svd`, ….

    peft-linear, -ties, -dare-linear, -dare-ties, -magnitude-prune:  the rule on the factors, each by itself,
        c = w s,  A' = rule(sgn(c) √|c| A_t),  B' = rule(√|c| B_t),  ΔW = B' A'      (not the rule on ΔW: products of different adapters come in)
    the same names with -svd:  the rule on s B_t A_t, then the nearest of a rank
    peft-cat, peft-svd:  the weighted sum, exact, and the nearest of a rank

Its TIES elects by unweighted numbers, calls a zero sum positive and divides by how many agree. An adapter that lacks a target is
left out there. With no generator given, random numbers are drawn as PEFT draws them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.merges.base import Rule, Vector, rule, total
from lorakit.merges.steps import drop, summed, weighted
from lorakit.method import choice


def _top(t: Tensor, density: float, gen: torch.Generator | None) -> Tensor:
    if density >= 1:
        return t
    keep = torch.zeros_like(t).reshape(-1)
    keep[t.abs().reshape(-1).topk(int(density * t.numel())).indices] = 1
    return t * keep.reshape(t.shape)


def _random(t: Tensor, density: float, gen: torch.Generator | None) -> Tensor:
    return t if density >= 1 else drop(t, density, gen)


def _agreeing(tensors: Sequence[Tensor], weights: Sequence[float], how: str) -> Tensor:
    score = summed(tensors if how == "total" else [t.sign() for t in tensors])
    elected = torch.where(score >= 0, 1, -1)
    masks = [t.sign() == elected for t in tensors]
    count = sum(m.to(tensors[0].dtype) for m in masks)
    return summed([t * m for t, m in zip(weighted(tensors, weights), masks, strict=True)]) / count.clamp_min(1.0)


@dataclass(frozen=True)
class Peft(Rule):
    """One of PEFT's combinations."""

    sparsify: ClassVar[Callable[[Tensor, float, torch.Generator | None], Tensor] | None] = None
    elects: ClassVar[bool] = False
    apart: ClassVar[bool] = False  # on the factors, each by itself

    density: float | None = None  # share of the numbers that stay
    majority_sign_method: str = choice("total", ("total", "frequency"))

    def __post_init__(self):
        if self.sparsify is not None and (self.density is None or self.density < 0):
            raise LorakitError(f"{self.name}: density is needed, a share of the numbers, not {self.density}")

    def combine(self, tensors: Sequence[Tensor], weights: Sequence[float], gen: torch.Generator | None) -> Tensor:
        if self.sparsify is not None:
            tensors = [type(self).sparsify(t, self.density, gen) for t in tensors]
        return _agreeing(tensors, weights, self.majority_sign_method) if self.elects else summed(weighted(tensors, weights))

    def merge(self, vectors, weights, at):
        some = [(v, w) for v, w in zip(vectors, weights, strict=True) if v.rank != 0]
        if not some or (self.sparsify is None and not self.apart):
            return total(vectors, weights)
        vectors, weights = zip(*some, strict=True)
        if not self.apart:
            return Vector(matrix=self.combine([v.dense() for v in vectors], weights, at.gen))
        if any(v.factors is None for v in vectors) or len({v.rank for v in vectors}) > 1:
            ranks = ", ".join(str(v.rank or "none") for v in vectors)
            raise LorakitError(f"{at.path}: {self.name} needs factors of one rank, these have {ranks}; mend: a rule that works on the update, "
                               f"{self.name.removeprefix('peft-')} or {self.name}-svd")
        size = [math.sqrt(abs(w * v.scale)) for v, w in zip(vectors, weights, strict=True)]
        signed = [math.copysign(k, w * v.scale) for k, v, w in zip(size, vectors, weights, strict=True)]
        A = self.combine([v.factors[1] for v in vectors], signed, at.gen)
        return Vector((self.combine([v.factors[0] / (v.scale or 1.0) for v in vectors], size, at.gen), A))


STEPS = {"": (None, False), "magnitude-prune": (_top, False), "ties": (_top, True), "dare-linear": (_random, False), "dare-ties": (_random, True)}
_own = {"__doc__": Peft.__doc__, "__module__": __name__}
for _name, (_sparsify, _elects) in STEPS.items():
    for _apart in (True, False):
        _word = f"peft-{_name or 'linear'}" if _apart else f"peft-{_name}-svd".replace("--", "-")
        _what = {"sparsify": _sparsify and staticmethod(_sparsify), "elects": _elects, "apart": _apart, "lowers": not _apart} | _own
        rule(_word, f"PEFT's {_word.removeprefix('peft-').replace('-', '_')}", "rule(B) rule(A)" if _apart else "rule(s B A)")(type("Peft", (Peft,), _what))
rule("peft-cat", "PEFT's cat", "Σ w ΔW")(type("Peft", (Peft,), _own))
