"""The k-th largest magnitude: of one tensor, or of many that are never all there at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

HALF = 1 << 15  # float32 without its sign: 31 bits, looked at in two halves


def kth_largest(t: Tensor, k: int) -> float:
    """The k-th largest |t|; infinity for k = 0, so that nothing reaches it."""
    if k <= 0:
        return math.inf
    return float(t.abs().reshape(-1).kthvalue(t.numel() - min(k, t.numel()) + 1).values)


def largest(t: Tensor, shares: Sequence[float], block: int) -> list[float]:
    """For every share, the int(share · N)-th largest of N magnitudes; beyond `block` numbers without a second tensor of that size."""
    if t.numel() <= block:
        return [kth_largest(t, int(s * t.numel())) for s in shares]
    return Cuts.of(lambda: ([piece] for piece in t.reshape(-1).split(block)), 1, shares)[0].found if shares else []


@dataclass
class Cuts:
    """Thresholds of one long sequence of numbers, read in pieces: for every share, its int(share · N)-th largest magnitude, exactly.

    The bits of a positive float32 are ordered as the numbers are. The first pass counts by the upper 16, the second, for every
    threshold, by the lower 15 of those that share its upper ones: memory is two tables, whatever N.
    """

    shares: Sequence[float]
    high: Tensor = field(default_factory=lambda: torch.zeros(1 << 16, dtype=torch.int64))
    low: dict[int, Tensor] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=list)  # of each threshold, inside its upper half
    ups: list[int] = field(default_factory=list)
    found: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, read: Callable[[], Iterable[Sequence[Tensor]]], n: int, shares: Sequence[float]) -> list[Cuts]:
        """For n sources whose pieces come together; `read` is called twice."""
        out = [cls(shares) for _ in range(n)]
        for what, settle in ((cls._first, cls._between), (cls._second, cls._end)):
            for tensors in read():
                for c, t in zip(out, tensors, strict=True):
                    what(c, t.abs().reshape(-1).contiguous().view(torch.int32))
            for c in out:
                settle(c)
        return out

    def _first(self, bits: Tensor) -> None:
        self.high += torch.bincount(bits >> 15, minlength=1 << 16)

    def _between(self) -> None:
        above = self.high.flip(0).cumsum(0).flip(0)  # numbers whose upper half is at least this
        for s in self.shares:
            k = int(s * int(above[0]))
            up = int((above >= max(k, 1)).nonzero().max()) if k else -1
            self.ups.append(up)
            self.ranks.append(k - int(above[up + 1]) if k and up + 1 < len(above) else k)
            self.low[up] = torch.zeros(HALF, dtype=torch.int64)

    def _second(self, bits: Tensor) -> None:
        for up, table in self.low.items():
            table += torch.bincount(bits[bits >> 15 == up] & (HALF - 1), minlength=HALF)

    def _end(self) -> None:
        for up, k in zip(self.ups, self.ranks, strict=True):
            above = self.low[up].flip(0).cumsum(0).flip(0)
            bits = (up << 15) + int((above >= k).nonzero().max()) if up >= 0 else 0
            self.found.append(float(torch.tensor(bits, dtype=torch.int32).view(torch.float32)) if up >= 0 else math.inf)
