"""Learnt tokens in front of the input embeddings.

The model sees n tokens more: embeddings, attention mask, positions and labels (-100) grow in front, and what comes out is cut to the
tokens that came in, so that logits keep their length and the loss is that of the longer sequence (the last learnt token predicts the
first real one, where that has a label). With a cache the prompt goes in once; afterwards only mask and positions know of it. An encoder
and decoder get the prompt in front of the encoder's input.

Rows with fewer learnt tokens are padded on the left with masked ones. A model that reads in both directions has its first token at the
first place, so there each row is turned until its padding is on the right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.prompts.columns import Columns

PER_TOKEN = ("logits", "last_hidden_state", "start_logits", "end_logits")  # of an output, what has a row for each token


def width(call: Any, site: Any) -> tuple[int, int]:
    """(rows, tokens) of what came in."""
    x = call.given.get("input_ids")
    x = call.given.get("inputs_embeds") if x is None else x
    if x is None:
        raise LorakitError(f"{type(site.module).__name__} was called without input_ids or inputs_embeds, so a prompt has nothing to stand before")
    return x.shape[0], x.shape[1]


def masked(given: dict[str, Any], cols: Columns, b: int, name: str = "attention_mask") -> dict[str, Tensor]:
    """The attention mask with the learnt columns in front."""
    mask = given.get(name)
    if mask is None:
        return {}
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise LorakitError("a prompt needs an attention mask of (rows, tokens) and got one made for a fixed cache; mend: generate without "
                           "cache_implementation='static'")
    return {name: torch.cat([cols.ahead(b, mask.device).to(mask), mask], 1)}


def shifted(given: dict[str, Any], cols: Columns) -> dict[str, Tensor]:
    """Positions of real tokens behind the learnt ones; where none were given the model counts by itself."""
    at = given.get("position_ids")
    if at is not None and at.dim() != 2:
        raise LorakitError("a prompt cannot be placed among positions of several dimensions; mend: leave position_ids out")
    mask = given.get("attention_mask")
    if at is not None and (mask is None or bool(mask.all())) and bool((at.diff() < 1).any()):
        raise LorakitError("several rows are packed into one here, and a prompt would stand before the first of them alone; mend: packing: false")
    return {} if at is None else {"position_ids": at + cols.counts[:, None].to(at)}


def tail(call: Any, site: Any) -> Any:
    """The call of a classifier that pools the last token it is not told is padding, which it cannot see in embeddings: with padding on the left."""
    ids, pad = call.given.get("input_ids"), getattr(site.text, "pad_token_id", None)
    if ids is None or pad is None or not site.pools_last or not bool((ids[:, -1] == pad).any()):
        return call
    t, given = ids.shape[1], call.given
    steps = torch.arange(t, device=ids.device)
    by = t - 1 - (steps * (ids != pad)).argmax(1, keepdim=True)  # (b, 1): how far each row moves to the right
    at = (steps - by) % t
    mask = given.get("attention_mask")
    mask = (steps >= by).to(ids) if mask is None else mask.gather(1, at) * (steps >= by)
    places = given.get("position_ids")
    places = at if places is None else places.expand_as(at).gather(1, at)
    return call.having(input_ids=ids.gather(1, at), attention_mask=mask, position_ids=places)


def fronted(inner: Callable[[Any], Any], call: Any, methods: Sequence[Any], cols: Columns, site: Any) -> Any:
    """inner's answer with the columns, (n, d) of each method, in front of the input embeddings."""
    if call.given.get("encoder_outputs") is not None:  # the encoder has read them already
        return inner(call)
    mine = {k: call.given[k] for m in methods for k in m.keeps if call.given.get(k) is not None}
    call = tail(dataclasses.replace(call, given={k: v for k, v in call.given.items() if k not in mine}), site)
    (b, t), given = width(call, site), call.given
    cols = cols.over(b)
    n, more = cols.n, masked(given, cols, b) | ({} if site.pairs else shifted(given, cols))
    if not call.first:
        return inner(call.having(**more))
    x = given.get("inputs_embeds")
    x = site.embed(given["input_ids"]) if x is None else x
    more["inputs_embeds"] = torch.cat([cols.of(b).to(x), x], 1)
    if (at := more.get("position_ids")) is not None:
        first = (torch.arange(n) - (n - cols.counts[:, None])).clamp_min(0).to(at)
        more["position_ids"] = torch.cat([first.expand(len(at), n), at], 1)
    types, labels = (v if v is not None and not site.pairs and v.shape[1:] == (t,) and not v.is_floating_point() else None
                     for v in (given.get("token_type_ids"), given.get("labels")))  # those that say something of each token
    more |= {} if types is None else {"token_type_ids": F.pad(types, (n, 0))}
    more |= {} if labels is None else told(methods, cols, labels, mine, site)
    off = None if cols.even or site.onward else n - cols.counts[:, None]  # (b, 1): how far each row is turned
    if off is not None:
        at = (torch.arange(n + t) + off) % (n + t)
        more = {k: v.expand(b, *v.shape[1:])[torch.arange(b)[:, None], at] for k, v in more.items()}
    more |= {k: given[k] + n for k in ("start_positions", "end_positions") if given.get(k) is not None}
    given = {k: v for k, v in (given | more).items() if k != "input_ids"}
    weights = given.pop("label_weights", None)
    labels = given.pop("labels") if weights is not None else None
    out = inner(dataclasses.replace(call, given=given))
    if weights is not None:
        out["loss"] = weighed(out["logits"], labels, weights)
    return out if site.pairs else shorten(out, n, t, off)


def told(methods: Sequence[Any], cols: Columns, labels: Tensor, mine: dict[str, Tensor], site: Any) -> dict[str, Tensor]:
    """Labels (b, n + t) and, where a method's loss is its own, how much each counts."""
    n, weights = cols.n, None
    out = F.pad(labels, (n, 0), value=-100)
    for k, m in enumerate(methods):
        rows = cols.rows(k)
        said = m.told(labels[rows], {name: v[rows] for name, v in mine.items()})
        if said is not None:
            weights = torch.ones(out.shape, device=out.device) if weights is None else weights
            more = out.shape[1] - said[0].shape[1]
            out[rows], weights[rows] = F.pad(said[0], (more, 0), value=-100), F.pad(said[1], (more, 0))
    if site.onward and not cols.even:  # what stands before a row's first token is padding, which predicts nothing
        out = out.scatter(1, (n - cols.counts[:, None]).to(out.device), -100)
    return {"labels": out} if weights is None else {"labels": out, "label_weights": weights}


def weighed(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The mean over the labels that are there, each as much as it counts."""
    labels = labels[:, 1:].to(logits.device)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none").view(labels.shape)
    return (loss * weights[:, 1:].to(loss))[labels != -100].mean()


def shorten(out: Any, n: int, t: int, off: Tensor | None = None) -> Any:
    """What a model gave for n + t tokens, for the t last of them; off (b, 1): how far each row was turned."""

    def cut(v: Any, name: str = "logits") -> Any:
        long = isinstance(v, Tensor) and v.dim() >= (2 if name.endswith("_logits") else 3) and v.shape[1] == n + t
        return v if not long else v[:, n:] if off is None else v[torch.arange(len(v))[:, None], torch.arange(n, n + t) - off]

    if not hasattr(out, "keys"):
        return tuple(cut(v) for v in out) if isinstance(out, tuple) else cut(out)
    for name in PER_TOKEN:
        if out.get(name) is not None:
            out[name] = cut(out[name], name)
    if out.get("hidden_states") is not None:
        out["hidden_states"] = tuple(cut(h) for h in out["hidden_states"])
    return out
