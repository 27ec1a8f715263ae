"""What the methods that make prompts share: how their small networks start (as torch's own layers do), and the check of their fields."""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.method import Method, Start


def linear(fan_in: str) -> Start:
    """U(-1/sqrt(f), 1/sqrt(f)), f what the method's `dims` call `fan_in`: nn.Linear's weights and biases, nn.LSTM's with its hidden size."""
    return lambda shape, method, origin, gen: (torch.rand(shape, generator=gen) * 2 - 1) * method.dims(0, 0)[fan_in] ** -0.5


def check(method: Method, count: str) -> None:
    """LorakitError for a number of tokens that is none."""
    n = getattr(method, count)
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise LorakitError(f"{method.name}: {count} must be a whole number of at least 1, not {n!r}")
