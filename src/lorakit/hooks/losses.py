"""Training rows that are kept apart for a hook to learn on, and losses that a hook may ask for besides the one that trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.hooks.surgery import draw


class Losses:
    """What a hook that learns on rows of its own asks of the loop around it: losses, each as often as it is called for."""

    def __init__(self):
        self.now: list[Callable[[], Tensor]] = []  # of this step's batches, with the same dropout as then; their sum is what was differentiated
        self.apart: Callable[[int], Tensor] | None = None  # of batch number k (from 0, without end) of the rows kept out of training

    def note(self, loss: Callable[[], Tensor]) -> None:
        """A forward pass for training is about to begin: how its loss is computed again."""
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        cpu, cards = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []

        def again() -> Tensor:
            with torch.random.fork_rng(range(len(cards))):
                torch.set_rng_state(cpu)
                for k, state in enumerate(cards):
                    torch.cuda.set_rng_state(state, k)
                return loss()

        self.now.append(again)


def parted(n: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Places of n rows, drawn by the seed: those to train on and the share to keep apart, at least one of each, both in order."""
    if n < 2:
        raise LorakitError(f"keeping rows out of training needs two at least, there are {n}; mend: more rows")
    order = torch.randperm(n, generator=draw(seed, 0, "rows kept apart")).tolist()
    k = min(max(1, round(share * n)), n - 1)
    return sorted(order[k:]), sorted(order[:k])


def batch_of(n: int, size: int, k: int, seed: int) -> list[int]:
    """Places of batch number k of n rows, which are shuffled anew each time they have all been seen."""
    epoch, at = divmod(k, -(-n // size))
    return torch.randperm(n, generator=draw(seed, epoch, "batches kept apart")).tolist()[at * size : (at + 1) * size]
