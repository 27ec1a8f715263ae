"""Packing, batches, holding out, and a preview of what is trained."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from lorakit.errors import LorakitError, extra
from lorakit.training.data.read import IGNORED, Row
from lorakit.training.data.tokens import MARK


def pack(rows: Sequence[Row], length: int) -> list[Row]:
    """Rows joined into fewer rows of at most `length` tokens, each put into the first that has room (greedy first fit).

    Gives {"input_ids", "labels", "position_ids"}. Positions begin at 0 in each piece; the first label of each piece is
    -100, as nothing in the piece predicts it. transformers keeps the pieces apart by the positions, but only without
    attention_mask (see `Collator`), with use_cache=False, and in models that can: ask `packs_apart(model)`.
    Raises LorakitError if a row is empty, longer than `length`, or has a class as its label.
    """
    bins: list[list[Row]] = []
    room: dict[int, int] = {}  # bin: free places, of those bins that can take another row
    shortest = min((len(row["input_ids"]) for row in rows), default=0)
    for n, row in enumerate(rows, 1):
        size = len(row["input_ids"])
        if not 0 < size <= length:
            raise LorakitError(
                f"row {n}: {size} tokens cannot be packed into {length}; mend: encode with max_length={length}"
            )
        if isinstance(row["labels"], int):
            raise LorakitError(f"row {n}: a row with a class cannot be packed; mend: leave these rows as they are")
        at = next((b for b, free in room.items() if free >= size), len(bins))
        if at == len(bins):
            bins.append([])
            room[at] = length
        bins[at].append(row)
        room[at] -= size
        if room[at] < shortest:
            del room[at]
    return [
        {
            "input_ids": [i for row in rows_ for i in row["input_ids"]],
            "labels": [i for row in rows_ for i in (IGNORED, *row["labels"][1:])],
            "position_ids": [i for row in rows_ for i in range(len(row["input_ids"]))],
        }
        for rows_ in bins
    ]


def packs_apart(model: torch.nn.Module) -> bool:
    """Whether attention in this causal model stays within the pieces of a packed row, tried on two tiny rows.

    Llama, Qwen, Mistral, Gemma and GPT-2 of transformers 5 do; OPT, BLOOM and MPT do not.
    """
    device, was = next(model.parameters()).device, model.training
    ids, places = torch.tensor([[1, 2, 5], [3, 4, 5]], device=device), torch.tensor([[0, 1, 0]] * 2, device=device)
    try:
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, position_ids=places, use_cache=False).logits[:, -1]
    except TypeError:  # no position_ids at all
        return False
    finally:
        model.train(was)
    return torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-4)


@dataclass(frozen=True)
class Collator:
    """Rows to a batch of int64 tensors, padded on the right; give it to DataLoader as `collate_fn`.

    (batch, longest row): input_ids, labels (padded with -100; (batch,) if the labels are classes), and attention_mask,
    or for packed rows position_ids instead: transformers ignores the bounds of packed pieces when it gets a mask. The
    padding of a packed row is a piece of its own. Rows of several tasks: task (batch,), their numbers. pad_to_multiple_of rounds the width up.
    """

    pad_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.pad_id is None:
            raise LorakitError("the tokenizer has no pad token; mend: tokenizer.pad_token = tokenizer.eos_token")

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        sizes = [len(row["input_ids"]) for row in rows]
        step = self.pad_to_multiple_of or 1
        width = -(-max(sizes) // step) * step

        def padded(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([[*row[name], *[fill] * (width - n)] for row, n in zip(rows, sizes, strict=True)])

        batch = {"input_ids": padded("input_ids", self.pad_id)}
        if isinstance(rows[0]["labels"], int):
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        else:
            batch["labels"] = padded("labels", IGNORED)
        if "task" in rows[0]:
            batch["task"] = torch.tensor([row["task"] for row in rows])
        if "position_ids" in rows[0]:
            places = [[*row["position_ids"], *range(width - n)] for row, n in zip(rows, sizes, strict=True)]
            return batch | {"position_ids": torch.tensor(places)}
        return batch | {"attention_mask": torch.tensor([[1] * n + [0] * (width - n) for n in sizes])}


def split(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, held out): `fraction` of the rows, drawn by random.Random(seed), is held out; both keep their order.

    Raises LorakitError if either part would be empty.
    """
    n = round(len(rows) * fraction)
    if not 0 < n < len(rows):
        raise LorakitError(
            f"holding out {fraction} of {len(rows)} rows leaves {len(rows) - n} to train and {n} to test; mend: more "
            "rows or another fraction"
        )
    held = set(random.Random(seed).sample(range(len(rows)), n))
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def preview(rows: Sequence[Row], tokenizer: Any, n: int = 3, width: int = 100, rich: bool = False) -> str:
    """The first `n` encoded rows as text, `width` characters a line, special tokens and line ends (↵) shown.

    What is trained stands between ⟦ and ⟧, or with rich=True is green in rich's markup. A long row loses its middle.
    """
    out = []
    for number, row in enumerate(rows[:n], 1):
        ids, labels = row["input_ids"], row["labels"]
        flags = [False] * len(ids) if isinstance(labels, int) else [label != IGNORED for label in labels]
        text, done, shown = "", 0, ""
        for on, run in groupby(flags):
            done += len(list(run))
            whole = tokenizer.decode(ids[:done])  # of all so far: some tokenizers drop the space before a first word
            piece, shown = whole[len(shown) :].replace("\n", "↵"), whole
            text += f"{MARK[0]}{piece}{MARK[1]}" if on else piece
        note = f"class {labels}" if isinstance(labels, int) else f"{sum(flags)} trained"
        out += [f"row {number}: {len(ids)} tokens, {note}", *_lines(text, width, rich)]
    return "\n".join(out)


def _lines(text: str, width: int, rich: bool) -> list[str]:
    lines, on = [], False
    for i in range(0, len(text), width):
        line = ""
        for part in re.split(f"([{MARK}])", text[i : i + width]):
            if part and part in MARK:
                on = part == MARK[0]
                line += "" if rich else "⟦" if on else "⟧"
            elif part:
                line += _styled(part, "green" if on else "dim") if rich else part
        lines.append(line)
    return lines if len(lines) <= 8 else [*lines[:3], "…", *lines[-4:]]


def _styled(text: str, style: str) -> str:
    try:
        from rich.markup import escape
    except ImportError as e:
        raise extra("rich", "train") from e
    return f"[{style}]{escape(text)}[/{style}]"
