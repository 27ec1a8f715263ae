"""Prompts of a batch's rows, all the same or each row its own: whose learnt columns go where, and what cannot be told to a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.method import Around, Part
from lorakit.prompts.cache import prefilled
from lorakit.prompts.columns import Columns
from lorakit.prompts.front import fronted, width


def through(parts: Sequence[Part], index: Tensor | None, inner: Callable[[Any], Any], call: Any, site: Any) -> Any:
    """inner's answer, row k of the batch behind the columns of parts[index[k]]; -1: none. Without an index all have the only part.

    A row's answer is what it is alone. Rows with fewer columns are padded with masked ones, and the call says where each row's tokens are.
    """
    prompts = [m.prompt(p, site) for _, m, p in parts]
    states = [m.states(p, site) for _, m, p in parts]
    front, behind = (_columns(some, index) for some in (prompts, states))
    check(parts, index, front, behind, call, site)
    if not front.even or not (behind.even or site.pairs):
        call = explicit(call, front.n + behind.n, site)
    inner = partial(prefilled, inner, cols=behind, site=site) if behind.parts else inner
    return fronted(inner, call, [m for (_, m, _), P in zip(parts, prompts, strict=True) if P is not None], front, site) if front.parts else inner(call)


class Prompted(Around):
    """A method that puts learnt columns in front of every row: of its embeddings, or of the keys and values of every layer."""

    mixed = staticmethod(through)
    keeps: ClassVar[tuple[str, ...]] = ()  # what of a batch is for `told` and not for the model
    in_front: ClassVar[bool] = True  # tokens of its own stand before the text, and the loss is that of the longer sequence

    def prompt(self, p, site) -> Tensor | None:
        """(n, o): learnt tokens."""
        return None

    def states(self, p, site) -> Tensor | None:
        """(layers, 2, heads, n, head_dim): learnt keys and values."""
        return None

    def told(self, labels: Tensor, mine: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Labels of prompt and text, (b, n + t), and how much each counts, where the loss is the method's own."""
        return None

    def around(self, p, inner, call, site):
        return through([Part("", self, p)], None, inner, call, site)


def _columns(parts: Sequence[Tensor | None], index: Tensor | None) -> Columns:
    """Of those that have some."""
    have = [k for k, part in enumerate(parts) if part is not None]
    at = None if index is None else torch.tensor([have.index(k) if k in have else -1 for k in range(len(parts))] + [-1])[index]
    return Columns([parts[k] for k in have], at)


def explicit(call: Any, n: int, site: Any) -> Any:
    """The call with the mask and the positions of its tokens said, as they are without learnt columns; a cache holds n of those."""
    given = call.given
    if given.get("encoder_outputs") is not None:
        return call
    b, t = width(call, site)
    x = next(v for k in ("input_ids", "inputs_embeds") if (v := given.get(k)) is not None)
    past = 0 if call.first else given["past_key_values"].get_seq_length() - n
    more: dict[str, Tensor] = {}
    if given.get("attention_mask") is None:
        more["attention_mask"] = torch.ones(b, past + t, dtype=torch.long, device=x.device)
    if given.get("position_ids") is None and site.positions == "told":
        more["position_ids"] = torch.arange(past, past + t, device=x.device).expand(b, t)
    return call.having(**more)


def check(parts: Sequence[Part], index: Tensor | None, front: Columns, behind: Columns, call: Any, site: Any) -> None:
    """LorakitError where the model cannot be told how far a row's tokens are from its columns, or that padding is no answer."""

    def who(cols: Columns) -> str:
        k, n = int(cols.counts.argmax()), cols.counts.tolist()
        few = int(cols.counts.argmin())
        return f"adapter `{parts[int(index[k])].name}` (row {k}) puts {n[k]} learnt columns in front, row {few} has {n[few]}, and {site.called}"

    if not front.even and call.given.get("start_positions") is not None:
        raise LorakitError(f"{who(front)} takes the padding for answers in its loss; mend: the loss of the logits, without start_positions and end_positions")
    for cols in (front, behind):
        if site.positions == "itself" and not cols.even and (cols is behind or site.onward):
            raise LorakitError(f"{who(cols)} counts positions by itself and cannot be told where each row begins; mend: a batch for each number of columns")
    window = getattr(site.text, "sliding_window", None)
    if front.parts and behind.parts and site.onward and window:
        raise LorakitError(f"{who(front)} counts the padding that is then between a prefix and its text, in a window of {window}; mend: "
                           "one batch for the prompts, one for the prefixes")
