"""Canonical rows to token ids with labels: which tokens are trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

from lorakit.errors import LorakitError, extra, near
from lorakit.training.data.read import IGNORED, Row
from lorakit.training.data.shapes import listed

CHAT = (  # the layout of a conversation for a tokenizer that has no chat template
    "{% for m in messages %}{{ '### ' + m['role'] | capitalize + ':\\n' + m['content'] }}"
    "{{ (eos_token if m['role'] == 'assistant' else '') + '\\n\\n' }}{% endfor %}"
    "{{ '### Assistant:\\n' if add_generation_prompt else '' }}"
)
MARK = "\ue000\ue001"  # private characters: stand in for an answer, and mark what is trained in a preview


@dataclass(frozen=True)
class Encoded:
    """Rows of token ids, and what became of the rows of text.

    rows: [{"input_ids": list[int], "labels": list[int] as long, or one int for a class}], and "task" where the row of text has one
    dropped: rows of text with nothing left to train; truncated: rows of text that lost tokens but are kept
    tokens, trained_tokens: counts over `rows`; trained are the labels that enter the loss
    """

    rows: list[Row]
    dropped: int
    truncated: int
    tokens: int
    trained_tokens: int


def encode(
    rows: Sequence[Row], tokenizer: Any, max_length: int, answer_only: bool = True, template: str | None = None
) -> Encoded:
    """Token ids and labels of canonical rows: messages, prompt and completion, or text (kinds may be mixed).

    messages: laid out by the tokenizer's chat template, or else by `CHAT`. Trained is each assistant turn, from the end
    of its generation prompt to its end-of-turn token (the special token that follows it); if there is none, the last
    answer gets an EOS.
    prompt and completion: see `split_prompt` for `template`. Each is tokenised alone, then joined: generation starts
    from the tokens of the prompt alone, too. One EOS at the end; BOS only if the tokenizer itself adds it.
    text: all is trained; EOS at the end if there is one; BOS if the tokenizer adds it or has one that is not its EOS.

    A row longer than `max_length` loses the start of its prompt if its last answer then fits, or else its end. A text
    is cut into pieces that overlap by one token, so that each token is still predicted once.
    answer_only=False trains the prompts as well.
    Raises LorakitError: nothing to train, no EOS, a template that does not fit, a row of another shape (its number).
    """
    _check(rows, max_length)
    encoded: list[Row] = []
    dropped = truncated = cut = 0
    for n, row in enumerate(rows, 1):
        ids, answer = _tokens(row, tokenizer, template, f"row {n}")
        long = len(ids) > max_length and "text" not in row
        if long:
            ids, answer = _fit(ids, answer, max_length, tokenizer.bos_token_id)
        pieces = [piece | _task(row) for piece in _pieces(ids, answer if answer_only else [True] * len(ids), max_length)]
        encoded += pieces
        dropped, truncated, cut = dropped + (not pieces), truncated + (long and bool(pieces)), cut + long
    if not encoded:
        cut_off = (
            f"label never answered: every answer is cut off by max_length={max_length}; mend: a larger max_length or "
            "shorter prompts"
        )
        raise LorakitError(cut_off if cut else "nothing to train: no row has an answer; mend: add assistant turns")
    return _encoded(encoded, dropped, truncated)


def _check(rows: Sequence[Row], max_length: int) -> None:
    if not rows:
        raise LorakitError("there are no rows to encode; mend: check the source of the data")
    if max_length < 2:
        raise LorakitError(f"max_length={max_length} leaves no token to predict another from; mend: at least 2")


def _pieces(ids: list[int], on: list[bool], size: int) -> list[Row]:
    """Rows of at most `size` ids that overlap by one, without those in which nothing is trained."""
    parts = [slice(i, i + size) for i in range(0, len(ids) - 1, size - 1)]
    return [
        {"input_ids": ids[p], "labels": [t if a else IGNORED for t, a in zip(ids[p], on[p], strict=True)]}
        for p in parts
        if any(on[p][1:])
    ]


def _task(row: Row) -> Row:
    """The number of the row's task, where it has one."""
    return {"task": row["task"]} if isinstance(row.get("task"), int) else {}


def _encoded(rows: list[Row], dropped: int, truncated: int) -> Encoded:
    tokens = sum(len(row["input_ids"]) for row in rows)
    labels = (row["labels"] for row in rows)
    trained = sum(1 if isinstance(x, int) else len(x) - 1 - x[1:].count(IGNORED) for x in labels)
    return Encoded(rows, dropped, truncated, tokens, trained)


def _tokens(row: Row, tokenizer: Any, template: str | None, where: str) -> tuple[list[int], list[bool]]:
    """The ids of one row, of any length, and which of them are an answer."""
    if "prompt" in row and "completion" in row:
        prompt, completion = split_prompt(row, template)
        head, tail, eos = prompt_ids(tokenizer, prompt), _ids(tokenizer, completion), _eos(tokenizer)
        tail += [eos] if tail[-1:] != [eos] else []
        return head + tail, [False] * len(head) + [True] * len(tail)
    if template is not None:
        raise LorakitError(f"{where}: a template is for prompt and completion, found {listed(row)}; mend: leave it out")
    if "messages" in row:
        return _chat_tokens(row["messages"], tokenizer, where)
    if "text" in row and "label" not in row:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        first = [bos] if bos is not None and (bos != eos or _adds_bos(tokenizer)) else []
        ids = first + _ids(tokenizer, row["text"]) + ([] if eos is None else [eos])
        return ids, [True] * len(ids)
    mend = "normalise(rows, shape) first; encode_labels for classes; prompt + chosen and prompt + rejected one by one"
    raise LorakitError(f"{where}: cannot encode the columns {listed(row)}; mend: {mend}")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise LorakitError("the tokenizer has no EOS token, so no answer would ever end; mend: set tokenizer.eos_token")
    return tokenizer.eos_token_id


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The ids that `encode` puts before an answer and generation must start from; BOS only if the tokenizer adds it."""
    return ([tokenizer.bos_token_id] if _adds_bos(tokenizer) else []) + _ids(tokenizer, prompt)


def split_prompt(row: Row, template: str | None = None) -> tuple[str, str]:
    """(prompt, completion) as laid out by a template like "_[inst] {prompt}_[/inst] {completion}".

    What stands before {completion} is the prompt, with its spaces; what stands after it is learnt as the answer's end.
    Raises LorakitError unless {prompt}, then one {completion}, and no other {name} are in it.
    """
    if template is None:
        return row["prompt"], row["completion"]
    head, _, tail = template.partition("{completion}")
    for name in re.findall(r"\{(\w+)\}", template):
        if name not in ("prompt", "completion"):
            raise LorakitError(f"template {template!r}: unknown {{{name}}}{near(name, ('prompt', 'completion'))}")
    if "{prompt}" not in head or "{prompt}" in tail or template.count("{completion}") != 1:
        raise LorakitError(f"template {template!r}: must hold {{prompt}} and, after it, {{completion}} once")
    return head.replace("{prompt}", row["prompt"]), row["completion"] + tail


def _fit(ids: list[int], answer: list[bool], size: int, bos: int | None) -> tuple[list[int], list[bool]]:
    """At most `size` ids: without the start of the prompt if the last answer then fits, or else without the end."""
    stop = max((i + 1 for i, on in enumerate(answer) if on), default=0)  # what follows the last answer teaches nothing
    start = next((i + 1 for i in range(stop - 1, -1, -1) if not answer[i]), 0)
    keep = int(ids[0] == bos)
    if not stop or stop - start + keep > size:
        return ids[:size], answer[:size]
    cut, left = max(stop - size + keep, keep), answer[:stop]
    if cut > keep and left[cut - 1]:  # the rest of a cut answer has lost its prompt: do not train it
        for i in takewhile(lambda i: left[i], range(cut, start)):
            left[i] = False
    return ids[:keep] + ids[cut:stop], left[:keep] + left[cut:]


def _chat_tokens(messages: list[dict[str, str]], tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    """Ids of a conversation and which are answers: tokenised in pieces if that changes nothing, else by offsets."""
    text, spans = _chat_spans(messages, tokenizer, where)
    ids = _ids(tokenizer, text)
    cuts = [0, *(edge for span in spans for edge in span), len(text)]
    pieces = [_ids(tokenizer, text[i:j]) for i, j in pairwise(cuts)]
    if [i for piece in pieces for i in piece] == ids:
        return ids, [bool(n % 2) for n, piece in enumerate(pieces) for _ in piece]
    if not tokenizer.is_fast:
        raise LorakitError(f"{where}: this tokenizer cannot tell where an answer begins; mend: load its fast version")
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return ids, [any(i < stop and j > start for start, stop in spans) for i, j in places]


def _render(messages: list[dict[str, str]], tokenizer: Any, where: str, start: bool = False) -> str:
    own, layout = tokenizer.chat_template, None
    if not own:
        _eos(tokenizer)
        layout = ("{{ bos_token }}" if _adds_bos(tokenizer) else "") + CHAT
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=start, chat_template=layout
        )
    except ImportError as e:
        raise extra("jinja2", "train") from e
    except Exception as e:  # a template raises what it likes
        raise LorakitError(
            f"{where}: the chat template refuses the conversation: {e}; mend: the order of its roles"
        ) from e


def _chat_spans(messages: list[dict[str, str]], tokenizer: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the [start, stop) of each answer in it.

    An answer begins where the conversation before it, with the generation prompt, ends. Its end is found by laying out
    the conversation again with a mark in place of the answer: what follows the mark must follow the answer as well.
    """
    text, spans, ended = _render(messages, tokenizer, where), [], True
    special = {str(t) for t in (*tokenizer.added_tokens_decoder.values(), *tokenizer.all_special_tokens)}
    special -= {tokenizer.bos_token} - {tokenizer.eos_token}
    ending = re.compile(rf"\s*({'|'.join(re.escape(t) for t in special if t.strip()) or '(?!)'})")
    for k, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        marked = [*messages[:k], turn | {"content": MARK}, *messages[k + 1 :]]
        before, found, after = _render(marked, tokenizer, where).partition(MARK)
        head = _render(messages[:k], tokenizer, where, start=True) if k else before
        start = len(head if text.startswith(head) else before)
        stop = len(text) - len(after)
        if not found or not text.startswith((head, before)) or not text.endswith(after) or start > stop:
            raise LorakitError(
                f"{where}, message {k + 1}: cannot find this answer in what the chat template makes of the "
                "conversation; mend: a template that shows every answer, or rows of prompt and completion"
            )
        end = ending.match(text, stop)
        ended = bool(end)
        spans.append((start, end.end() if end else stop))
    if not ended and messages[-1]["role"] == "assistant":
        _eos(tokenizer)
        text = text[: spans[-1][1]] + tokenizer.eos_token
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


def encode_labels(
    rows: Sequence[Row], tokenizer: Any, max_length: int, labels: Sequence[str] | None = None
) -> tuple[Encoded, list[str]]:
    """({"input_ids": list[int], "labels": int} rows, names of the classes) of {"text", "label"} rows.

    The id of a class is its place among the sorted names (as numbers if all are). For evaluation data give `labels`,
    the names that the training data gave. Texts get the tokenizer's special tokens and lose their end if too long.
    Raises LorakitError: a label that is not in `labels` (with its row), a single class, nothing but empty texts.
    """
    _check(rows, max_length)
    if bad := next((n for n, row in enumerate(rows, 1) if not {"text", "label"} <= row.keys()), 0):
        raise LorakitError(
            f"row {bad}: needs `text` and `label`, found {listed(rows[bad - 1])}; mend: normalise the rows"
        )
    found = {str(row["label"]) for row in rows}
    names = [str(x) for x in labels or ()] or sorted(
        found, key=int if all(re.fullmatch(r"-?\d+", x) for x in found) else str
    )
    if len(names) < 2:
        raise LorakitError(f"there is only one label, `{names[0]}`; mend: data with two classes at least")
    number, mend = {name: i for i, name in enumerate(names)}, "; mend: train with rows of it, or leave it out"
    encoded, truncated = [], 0
    for n, row in enumerate(rows, 1):
        if (label := str(row["label"])) not in number:
            raise LorakitError(f"row {n}: the label `{label}` was never seen in training{near(label, names)}{mend}")
        ids = tokenizer(row["text"], verbose=False)["input_ids"]
        if len(ids) > max_length:
            ids, truncated = tokenizer(row["text"], truncation=True, max_length=max_length)["input_ids"], truncated + 1
        if ids:
            encoded.append({"input_ids": ids, "labels": number[label]} | _task(row))
    if not encoded:
        raise LorakitError("nothing to train: every text is empty; mend: check the column of the text")
    return _encoded(encoded, len(rows) - len(encoded), truncated), names
