"""Learnt columns in front of the rows of a batch: the same for every row, or each row its own, or none."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.maps import spread


@dataclass(frozen=True)
class Columns:
    """Row k of a batch has parts[index[k]], (…, n, d), in front, padded on the left to the longest; index -1: nothing.

    Without an index every row has the only part, or nothing where there is none.
    """

    parts: Sequence[Tensor]
    index: Tensor | None = None  # (b,), on the CPU

    def over(self, b: int) -> Columns:
        """For a batch of b, in which several entries may stand for one row (beams)."""
        return self if self.index is None else dataclasses.replace(self, index=spread(self.index, b, "a model"))

    @property
    def n(self) -> int:
        """The columns of the longest part."""
        return max([0, *(p.shape[-2] for p in self.parts)])

    @cached_property
    def counts(self) -> Tensor:
        """(b,), or (1,) where every row has the same: the columns of each row."""
        sizes = torch.tensor([p.shape[-2] for p in self.parts] + [0])
        return sizes[:1] if self.index is None or not self.parts else sizes[self.index]

    @property
    def even(self) -> bool:
        """Whether every row has as many."""
        return self.index is None or bool((self.counts == self.n).all())

    def ahead(self, b: int, device: torch.device) -> Tensor:
        """(b, n): whether a column is one of the row's own, not padding."""
        return (torch.arange(self.n) >= self.n - self.counts[:, None]).expand(b, self.n).to(device)

    def rows(self, k: int) -> Tensor | slice:
        """Which rows have part k."""
        return slice(None) if self.index is None else (self.index == k).nonzero().squeeze(1)

    def of(self, b: int, parts: Sequence[Tensor] | None = None) -> Tensor:
        """(b, …, n, d): the columns of every row; parts: what else each part has."""
        parts = self.parts if parts is None else parts
        if self.index is None:
            return parts[0].expand(b, *parts[0].shape)
        n = max(p.shape[-2] for p in parts)
        wide = [F.pad(p, (0, 0, n - p.shape[-2], 0)) for p in parts]
        return torch.stack([*wide, torch.zeros_like(wide[0])])[self.index.to(wide[0].device)]
