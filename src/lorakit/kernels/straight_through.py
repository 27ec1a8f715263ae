"""The straight-through estimator: a value that has no gradient takes another's. Bengio et al., 2013, arXiv 1308.3432."""

from __future__ import annotations

import torch
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    """(value, carrier), equal shapes -> the value; the gradient goes to both as it is."""

    @staticmethod
    def forward(ctx, value: Tensor, carrier: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        return g, g
