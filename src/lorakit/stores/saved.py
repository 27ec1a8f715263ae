"""What is made anew in the backward pass instead of being kept for it: matrices that stand packed in a store.

Inside `lean()`, a tensor that autograd saves and that lies in a matrix from `made(make)` is dropped, and made and cut out again when it is needed.
Other tensors go where they would have gone: to hooks that were there before (checkpointing, offloading, counting), or to autograd.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_here = threading.local()


@dataclass(frozen=True)
class _Again:
    """How to get a dropped tensor back."""

    make: Callable[[], Tensor]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return self.make().as_strided(self.size, self.stride, self.offset)


def made(make: Callable[[], Tensor]) -> Tensor:
    """make(), which gives the same contiguous matrix at every call; known to the `lean` around."""
    M = make()
    if torch.compiler.is_compiling():
        return M
    known = getattr(_here, "known", None)
    if known is not None:
        known[M.untyped_storage()._cdata] = (M, M._version, make)
    return M


@contextmanager
def lean() -> Iterator[None]:
    """Inside, matrices from `made` are not kept for the backward pass. What is inside another one belongs to that."""
    if getattr(_here, "known", None) is not None or not torch.is_grad_enabled():
        yield
        return
    known: dict[int, tuple[Tensor, int, Callable]] = {}
    keep, give = torch._C._autograd._top_saved_tensors_default_hooks(True) or (Tensor.detach, _same)  # a node that held its own result would never be freed

    def pack(t: Tensor) -> Any:
        M, version, make = known.get(t.untyped_storage()._cdata, (None, 0, None))
        if M is not None and M._version == version and t.dtype == M.dtype and not t.requires_grad:
            return _Again(make, t.size(), t.stride(), t.storage_offset())
        return keep(t)

    def unpack(kept: Any) -> Tensor:
        return kept.tensor() if isinstance(kept, _Again) else give(kept)

    _here.known = known
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _here.known = None
        known.clear()


def leanly(call: Callable) -> Callable:
    """The call inside `lean`; a compiled graph decides itself what it keeps."""
    if torch.compiler.is_compiling():
        return call

    def inside(*args):
        with lean():
            return call(*args)

    return inside


def _same(t: Any) -> Any:
    return t
