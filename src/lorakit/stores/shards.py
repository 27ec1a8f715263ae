"""Tensors that FSDP2 spreads over processes: gathered one at a time, by all processes together; the first one writes.

What gathers is a collective: every process calls it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn

from lorakit.errors import LorakitError

WRITES = ("the weights are spread over processes (FSDP), which write them at their next step; mend: lorakit.save the adapter, then load and "
          "merge it in one process")
GROWS = ("the model is spread over processes already (FSDP), which would not sum the gradients of new tensors; mend: lorakit.{}(model, ...) first, "
         "then fully_shard")


def scattered(t: object) -> bool:
    """Whether this process holds only a part of the tensor."""
    return type(t).__name__ == "DTensor"


def sharded(model: nn.Module) -> bool:
    """Whether the model is spread over processes. What its last call left gathered goes back first, so that every part is its own."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    for m in model.modules():
        if isinstance(m, FSDPModule):
            m.reshard()
    return any(scattered(p) for p in model.parameters())


def plain_class(module: nn.Module) -> type:
    """A module's class before FSDP2 made one of its own from it."""
    cls, above, *more = (*type(module).__mro__, object, object)
    return more[0] if above.__name__ == "FSDPModule" else cls


def whole(t: Tensor) -> Tensor:
    """All values of a tensor."""
    return t.to(t.device_mesh.device_type).full_tensor() if scattered(t) else t


def part(t: Tensor) -> Tensor:
    """The values that this process holds."""
    return t.to_local() if scattered(t) else t


def cut(value: Tensor, place: Tensor) -> Tensor:
    """Values laid out as `place` is."""
    if not scattered(place):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(place.device_mesh.device_type, place.dtype), place.device_mesh, place.placements).to(place.device)


def every(yes: bool) -> bool:
    """Whether all processes say yes."""
    said: list[bool | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, yes)
    return all(said)


@contextmanager
def writer(model: nn.Module) -> Iterator[bool]:
    """Inside, whether this process is to write. With a sharded model the first one does; the others wait, and its error is theirs."""
    if not sharded(model):
        yield True
        return
    error = None
    try:
        yield dist.get_rank() == 0
    except Exception as e:
        error = e
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if error is None else str(error))
    if error is not None:
        raise error
    if told := [s for s in said if s is not None]:
        raise LorakitError(f"another process failed: {told[0]}")
