"""Learnt tokens in front of the input embeddings.

The model sees n tokens more: embeddings, attention mask, positions and labels (-100) grow in front, and what comes out is cut to the
tokens that came in, so that logits keep their length and the loss is that of the longer sequence (the last learnt token predicts the
first real one, where that has a label). With a cache the prompt goes in once; afterwards only mask and positions know of it. An encoder
and decoder get the prompt in front of the encoder's input.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.method import Around

PER_TOKEN = ("logits", "last_hidden_state", "start_logits", "end_logits")  # of an output, what has a row for each token


class Prompted(Around):
    """A method that puts `prompt`, (n, o), in front of every input."""

    @abstractmethod
    def prompt(self, p, site) -> Tensor: ...

    def around(self, p, inner, call, site):
        if call.given.get("encoder_outputs") is not None:  # the encoder has read it already
            return inner(call)
        longer, n, t = lengthen(call, self.prompt(p, site), site)
        out = inner(longer)
        return shorten(out, n, t) if call.first and not site.pairs else out


def width(call: Any, site: Any) -> tuple[int, int]:
    """(rows, tokens) of what came in."""
    x = call.given.get("input_ids")
    x = call.given.get("inputs_embeds") if x is None else x
    if x is None:
        raise LorakitError(f"{type(site.module).__name__} was called without input_ids or inputs_embeds, so a prompt has nothing to stand before")
    return x.shape[0], x.shape[1]


def masked(given: dict[str, Any], b: int, n: int) -> dict[str, Tensor]:
    """The attention mask with n tokens more in front."""
    mask = given.get("attention_mask")
    if mask is None:
        return {}
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise LorakitError("a prompt needs an attention mask of (rows, tokens) and got one made for a fixed cache; mend: generate without "
                           "cache_implementation='static'")
    return {"attention_mask": torch.cat([mask.new_ones(b, n), mask], 1)}


def shifted(given: dict[str, Any], n: int) -> dict[str, Tensor]:
    """Positions of real tokens behind n others; where none were given the model counts by itself."""
    at = given.get("position_ids")
    if at is not None and at.dim() != 2:
        raise LorakitError("a prompt cannot be placed among positions of several dimensions; mend: leave position_ids out")
    mask = given.get("attention_mask")
    if at is not None and (mask is None or bool(mask.all())) and bool((at.diff() < 1).any()):
        raise LorakitError("several rows are packed into one here, and a prompt would stand before the first of them alone; mend: packing: false")
    return {} if at is None else {"position_ids": at + n}


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


def lengthen(call: Any, prompt: Tensor, site: Any) -> tuple[Any, int, int]:
    """The call with the prompt (n, o) in front; n; and how many tokens came in."""
    call = tail(call, site)
    (b, t), n, given = width(call, site), len(prompt), call.given
    more: dict[str, Any] = masked(given, b, n) | ({} if site.pairs else shifted(given, n))
    if not call.first:
        return call.having(**more), n, t
    x = given.get("inputs_embeds")
    x = site.embed(given["input_ids"]) if x is None else x
    more |= {"inputs_embeds": torch.cat([prompt.to(x).expand(b, *prompt.shape), x], 1), "input_ids": None}
    if "position_ids" in more:
        at = more["position_ids"]
        more["position_ids"] = torch.cat([torch.arange(n, device=at.device, dtype=at.dtype).expand(len(at), n), at], 1)
    for name, fill in (("token_type_ids", 0), ("labels", -100)):
        v = given.get(name)
        if v is not None and not site.pairs and v.dim() == 2 and v.shape[1] == t and not v.is_floating_point():
            more[name] = torch.cat([v.new_full((b, n), fill), v], 1)
    for name in ("start_positions", "end_positions"):
        more |= {name: given[name] + n} if given.get(name) is not None else {}
    longer = call.having(**more)
    return dataclasses.replace(longer, given={k: v for k, v in longer.given.items() if k != "input_ids"}), n, t


def shorten(out: Any, n: int, t: int) -> Any:
    """What a model gave for n + t tokens, for the t last of them."""

    def cut(v: Any, name: str = "logits") -> Any:
        long = isinstance(v, Tensor) and v.dim() >= (2 if name.endswith("_logits") else 3) and v.shape[1] == n + t
        return v[:, n:] if long else v

    if not hasattr(out, "keys"):
        return tuple(cut(v) for v in out) if isinstance(out, tuple) else cut(out)
    for name in PER_TOKEN:
        if out.get(name) is not None:
            out[name] = cut(out[name], name)
    if out.get("hidden_states") is not None:
        out["hidden_states"] = tuple(cut(h) for h in out["hidden_states"])
    return out
