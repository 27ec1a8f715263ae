"""Learnt keys and values in front of every layer's own: a cache that is filled before the model first writes into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.prompts.front import masked, shifted, width


def prefilled(inner: Callable[[Any], Any], call: Any, states: Tensor, site: Any) -> Any:
    """inner's answer with the states in front of every layer's keys and values."""
    if site.pairs:
        return paired(inner, call, states, site)
    if site.cached is site.module:
        out = inner(prefill(call, states, site))
        mine = call.given.get("past_key_values") is None and call.given.get("use_cache") is False and hasattr(out, "keys")
        return type(out)(**{k: v for k, v in out.items() if k != "past_key_values"}) if mine else out  # nobody asked for a cache

    def body(module, args, kwargs):
        return (), prefill(type(call)(dict(zip(("input_ids",), args, strict=False)) | kwargs), states, site).given

    hook = site.cached.register_forward_pre_hook(body, with_kwargs=True)
    try:
        return inner(call)
    finally:
        hook.remove()


def paired(inner: Callable[[Any], Any], call: Any, states: Tensor, site: Any) -> Any:
    """inner's answer with the states in front of the keys and values of a decoder's own attention, behind an encoder."""
    given = call.given
    if call.generates:  # it calls the model, and that is where the cache is
        return inner(call)
    x = next(t for k in ("decoder_input_ids", "decoder_inputs_embeds", "labels", "input_ids", "inputs_embeds") if (t := given.get(k)) is not None)
    b, n, mask = len(x), states.shape[-2], given.get("decoder_attention_mask")
    more = {} if mask is None else {"decoder_attention_mask": torch.cat([mask.new_ones(b, n), mask], 1)}
    if not call.first:
        return inner(call.having(**more))
    refuse(site)
    cache = given.get("past_key_values")
    if cache is None:
        from transformers import DynamicCache, EncoderDecoderCache

        cache = EncoderDecoderCache(DynamicCache(config=site.text), DynamicCache(config=site.text))
    fill(cache.self_attention_cache, b, states, site)
    return inner(call.having(**more, past_key_values=cache))


def refuse(site: Any) -> None:
    if site.module.training and any(getattr(m, "gradient_checkpointing", False) for m in site.module.modules()):
        raise LorakitError("prefix tuning lives in the cache, which gradient checkpointing empties; mend: gradient_checkpointing: false, or prompt-tuning")


def fill(cache: Any, b: int, states: Tensor, site: Any) -> None:
    """The same states for every row."""
    for layer, (k, v) in enumerate(states.to(site.dtype)):
        cache.update(k.expand(b, *k.shape), v.expand(b, *v.shape), layer)


def prefill(call: Any, states: Tensor, site: Any) -> Any:
    """The call with the states (layers, 2, heads, n, head_dim) in its cache, and mask and positions that know of them."""
    b, _ = width(call, site)
    n = states.shape[-2]
    more: dict[str, Any] = masked(call.given, b, n) | shifted(call.given, n)
    if not call.first:
        return call.having(**more)
    refuse(site)
    cache = call.given.get("past_key_values")
    if cache is None:
        from transformers import DynamicCache

        cache = DynamicCache(config=site.text)
    fill(cache, b, states, site)
    return call.having(**more, past_key_values=cache)
