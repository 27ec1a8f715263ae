"""Mixed batches through a module that reads its weights: which dimension of its inputs and outputs holds the batch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError

NO_ROWS = re.compile(r"(^|\.)(experts\.\d+(\.|$)|relative_attention_bias$)")  # what these get are not the rows of the batch


@dataclass
class Batch:
    """The inputs of one call: for each tensor its batch dimension and how many entries in a row belong to one element of the batch."""

    n: int
    args: tuple
    kwargs: dict[str, Any]
    dims: dict[int | str, tuple[int, int]]
    out: tuple[int, ...] = (0,)

    def take(self, rows: Tensor) -> tuple[tuple, dict[str, Any]]:
        def cut(key, t):
            if key not in self.dims:
                return t
            dim, each = self.dims[key]
            at = rows if each == 1 else (rows[:, None] * each + torch.arange(each)).reshape(-1)
            return t.index_select(dim, at.to(t.device))

        return tuple(cut(k, t) for k, t in enumerate(self.args)), {k: cut(k, t) for k, t in self.kwargs.items()}

    def join(self, parts: list[Any], rows: list[Tensor]) -> Any:
        order = torch.cat(rows).argsort()

        def glue(parts, dim):
            return torch.cat(parts, dim).index_select(dim, order.to(parts[0].device)) if isinstance(parts[0], Tensor) else parts[0]

        if not isinstance(parts[0], tuple):
            return glue(parts, self.out[0])
        return tuple(glue(p, self.out[min(k, len(self.out) - 1)]) for k, p in enumerate(zip(*parts, strict=True)))


def batch_of(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Batch:
    """How a call is cut into rows: along the first dimension, for every tensor as long as the first; attention says its own."""
    if isinstance(module, nn.MultiheadAttention):
        given = dict(inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs).arguments)
        given.pop("self")
        b, mask = 0 if module.batch_first else 1, given.get("attn_mask")
        if given["query"].dim() != 3:
            raise LorakitError("a mixed batch needs batched inputs, (batch, length, width), for MultiheadAttention")
        dims = {"query": (b, 1), "key": (b, 1), "value": (b, 1)}
        dims |= {"key_padding_mask": (0, 1)} if given.get("key_padding_mask") is not None else {}
        dims |= {"attn_mask": (0, module.num_heads)} if mask is not None and mask.dim() == 3 else {}
        return Batch(given["query"].shape[b], (), given, dims, (b, 0))
    tensors = {k: t for k, t in [*enumerate(args), *kwargs.items()] if isinstance(t, Tensor) and t.dim()}
    n = len(next(iter(tensors.values())))
    return Batch(n, args, dict(kwargs), {k: (0, 1) for k, t in tensors.items() if len(t) == n})
