"""Learnt keys and values in front of every layer's own: a cache that is filled before the model first writes into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.prompts.front import masked, shifted, width


def prefilled(inner: Callable[[Any], Any], call: Any, states: Tensor, site: Any) -> Any:
    """inner's answer with the states in front of every layer's keys and values."""
    if site.cached is site.module:
        return inner(prefill(call, states, site))

    def body(module, args, kwargs):
        return (), prefill(type(call)(dict(zip(("input_ids",), args, strict=False)) | kwargs), states, site).given

    hook = site.cached.register_forward_pre_hook(body, with_kwargs=True)
    try:
        return inner(call)
    finally:
        hook.remove()


def prefill(call: Any, states: Tensor, site: Any) -> Any:
    """The call with the states (layers, 2, heads, n, head_dim) in its cache, and mask and positions that know of them."""
    b, _ = width(call, site)
    n = states.shape[-2]
    more: dict[str, Any] = masked(call.given, b, n) | shifted(call.given, n)
    if not call.first:
        return call.having(**more)
    if site.module.training and getattr(site.module, "is_gradient_checkpointing", False):
        raise LorakitError("prefix tuning lives in the cache, which gradient checkpointing empties; mend: gradient_checkpointing: false, or prompt-tuning")
    cache = call.given.get("past_key_values")
    if cache is None:
        from transformers import DynamicCache

        cache = DynamicCache(config=site.text)
    dtype = site.dtype
    for layer, (k, v) in enumerate(states.to(dtype)):
        cache.update(k.expand(b, *k.shape), v.expand(b, *v.shape), layer)
    return call.having(**more, past_key_values=cache)
