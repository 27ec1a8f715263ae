"""Changing what an optimiser remembers of a parameter, and random draws that are the same in every process.

Every tensor of `optimizer.state[p]` that has p's shape is changed (averages, momentum, a float32 copy); counters stay unless the
whole memory is dropped with `forget`. Block-quantised states (8-bit optimisers) have another shape: only `forget` is right for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import host
from lorakit.errors import LorakitError

PRUNES = ("random", "magnitude", "zero")


def draw(seed: int, step: int, what: str = "") -> torch.Generator:
    """A generator that depends on the seed, the step and a name alone: the same in every process, and again after a resume."""
    return host.generator(seed, f"step {step} {what}")


def some(what: Sequence[str], n: int, seed: int, step: int) -> list[str]:
    """n of them, uniformly and without repetition, the same in every process."""
    return [what[k] for k in torch.randperm(len(what), generator=draw(seed, step, "some"))[:n].tolist()]


def memory(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what the optimiser keeps of this parameter, entry by entry."""
    for k, t in optimizer.state.get(p, {}).items():
        if isinstance(t, Tensor) and t.shape == p.shape and t.is_floating_point():
            yield k, t


@torch.no_grad()
def zero(optimizer: torch.optim.Optimizer, params: Iterable[nn.Parameter]) -> None:
    for p in params:
        for _, t in memory(optimizer, p):
            t.zero_()


def forget(optimizer: torch.optim.Optimizer, params: Iterable[nn.Parameter]) -> None:
    """All of it, counters too, as if the parameter had never been stepped."""
    for p in params:
        optimizer.state.pop(p, None)


@torch.no_grad()
def prune(optimizer: torch.optim.Optimizer, params: Iterable[nn.Parameter], share: float, mode: str = "random", gen: torch.Generator | None = None) -> None:
    """Sets a share of the entries to zero: random ones, the smallest of each tensor, or all.

    Random ones are the same in all tensors of a parameter: an average of gradients whose average of squares is gone makes a huge step.
    """
    if mode not in PRUNES or not 0 <= share <= 1:
        raise LorakitError(f"pruning an optimiser's state: mode one of {', '.join(PRUNES)} and a share from 0 to 1, not {mode!r}, {share!r}")
    for p in params:
        stays = torch.rand(p.shape, generator=gen) >= share if mode == "random" else None
        for _, t in memory(optimizer, p):
            if mode == "zero":
                t.zero_()
            elif stays is not None:
                t.mul_(stays.to(t))
            elif n := int(share * t.numel()):
                t.masked_fill_(t.abs() <= t.abs().flatten().kthvalue(n).values, 0)


def replace(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, change: Callable[[Tensor], Tensor] = lambda t: t) -> None:
    """The optimiser goes on with another Parameter object in the place of this one; change: from old to new shape."""
    for g in optimizer.param_groups:
        g["params"] = [new if p is old else p for p in g["params"]]
    mine = dict(memory(optimizer, old))
    state: dict[str, Any] = optimizer.state.pop(old, {})
    if state:
        optimizer.state[new] = {k: change(t) if k in mine else t for k, t in state.items()}


def slice_(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, keep: Tensor, dim: int = 0) -> None:
    """new holds old's entries `keep` along a dimension."""
    replace(optimizer, old, new, lambda t: t.index_select(dim, keep.to(t.device)))


def extend(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, n: int, dim: int = 0) -> None:
    """new has n entries more along a dimension, of which the optimiser knows nothing yet."""

    def more(t: Tensor) -> Tensor:
        shape = list(t.shape)
        shape[dim] = n
        return torch.cat([t, t.new_zeros(shape)], dim)

    replace(optimizer, old, new, more)
