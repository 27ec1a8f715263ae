"""Bring your own LoRA: lower the rank of a trained adapter, without its data and without a matrix of the layer's size.

    s B A of rank r   →   B' A' of rank q, the nearest of all (Eckart and Young; `kernels.svd.lower_rank`)

What is left out has the norm sqrt(sum of the σ² beyond the q-th).
"""

from __future__ import annotations

import torch
from torch import nn

from lorakit import host
from lorakit.errors import LorakitError
from lorakit.kernels.svd import lower_rank
from lorakit.maps import each
from lorakit.merges.mix import put


@torch.no_grad()
def shrink(model: nn.Module, name: str, rank: int, new_name: str) -> dict[str, float]:
    """Puts a copy of an adapter with a lower rank on the model, beside it and not active; returns each target's relative error, and "overall".

    The adapter is a product of two factors on every target, its scale included: LoRA and whatever amounts to one.
    """
    state = host.known(model, [name])
    if rank < 1:
        raise LorakitError(f"shrink: the rank must be at least 1, not {rank}")
    if new_name in state.specs:
        raise LorakitError(f"shrink: the model has an adapter `{new_name}` already")
    made, errors = {}, {}
    for path, slot in host.slots(model, name).items():
        if name in slot.tied:
            continue
        method, p = slot.methods[name], slot.params(name)
        if method.replaces or (slot.absorbed and slot.absorbed.adapter == name) or method.bias(p, slot.site.bias) is not slot.site.bias or \
                method.two(slot.first(name)) is None:
            raise LorakitError(f"shrink: on {path} the adapter is no product of two factors ({method.name}); mend: lorakit.save(form='lora', rank={rank})")
        B, A, left, whole = lower_rank(*each(slot.site, method, method.two, p), rank)
        made[path], errors[path] = (B, A), (left, whole)
    put(model, new_name, made, state.specs[name].tie, state.specs[name].dropout)
    left, whole = (sum(e[n] ** 2 for e in errors.values()) ** 0.5 for n in (0, 1))
    return {p: a / b if b else 0.0 for p, (a, b) in errors.items()} | {"overall": left / whole if whole else 0.0}
