"""Learnt keys and values in front of every layer's own: a cache that is filled before the model first writes into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorakit.errors import LorakitError
from lorakit.prompts.columns import Columns
from lorakit.prompts.front import masked, shifted, width


def prefilled(inner: Callable[[Any], Any], call: Any, cols: Columns, site: Any) -> Any:
    """inner's answer with the columns, states (layers, 2, heads, n, head_dim), in front of every layer's keys and values."""
    if site.pairs:
        return paired(inner, call, cols, site)
    if site.cached is site.module:
        out = inner(prefill(call, cols, site))
        mine = call.given.get("past_key_values") is None and call.given.get("use_cache") is False and hasattr(out, "keys")
        return type(out)(**{k: v for k, v in out.items() if k != "past_key_values"}) if mine else out  # nobody asked for a cache

    def body(module, args, kwargs):
        return (), prefill(type(call)(dict(zip(("input_ids",), args, strict=False)) | kwargs), cols, site).given

    hook = site.cached.register_forward_pre_hook(body, with_kwargs=True)
    try:
        return inner(call)
    finally:
        hook.remove()


def paired(inner: Callable[[Any], Any], call: Any, cols: Columns, site: Any) -> Any:
    """inner's answer with the states in front of the keys and values of a decoder's own attention, behind an encoder."""
    given = call.given
    if call.generates:  # it calls the model, and that is where the cache is
        return inner(call)
    x = next(t for k in ("decoder_input_ids", "decoder_inputs_embeds", "labels", "input_ids", "inputs_embeds") if (t := given.get(k)) is not None)
    (b, t), cache, name = x.shape[:2], given.get("past_key_values"), "decoder_attention_mask"
    cols = cols.over(b)
    if not cols.even and given.get(name) is None:
        past = 0 if call.first else cache.get_seq_length() - cols.n
        call = call.having(**{name: torch.ones(b, past + t, dtype=torch.long, device=x.device)})
    more = masked(call.given, cols, b, name)
    if not call.first:
        return inner(call.having(**more))
    refuse(site)
    if cache is None:
        from transformers import DynamicCache, EncoderDecoderCache

        cache = EncoderDecoderCache(DynamicCache(config=site.text), DynamicCache(config=site.text))
    fill(cache.self_attention_cache, b, cols, site)
    return inner(call.having(**more, past_key_values=cache))


def refuse(site: Any) -> None:
    if site.module.training and any(getattr(m, "gradient_checkpointing", False) for m in site.module.modules()):
        raise LorakitError("prefix tuning lives in the cache, which gradient checkpointing empties; mend: gradient_checkpointing: false, or prompt-tuning")


def fill(cache: Any, b: int, cols: Columns, site: Any) -> None:
    """The states of every row."""
    parts = [p.to(site.dtype) for p in cols.parts]
    for layer in range(len(parts[0])):
        cache.update(*(cols.of(b, [p[layer, j] for p in parts]) for j in range(2)), layer)


def prefill(call: Any, cols: Columns, site: Any) -> Any:
    """The call with the states in its cache, and mask and positions that know of them."""
    b, _ = width(call, site)
    cols = cols.over(b)
    more: dict[str, Any] = masked(call.given, cols, b) | shifted(call.given, cols)
    if not call.first:
        return call.having(**more)
    refuse(site)
    cache = call.given.get("past_key_values")
    if cache is None:
        from transformers import DynamicCache

        cache = DynamicCache(config=site.text)
    fill(cache, b, cols, site)
    return call.having(**more, past_key_values=cache)
