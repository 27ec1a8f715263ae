"""Data for training: read rows, tell their shape, turn them into token ids, pack and batch them.

    rows = read_rows("chats.jsonl")                # a file, a folder or a hub name -> plain dicts
    rows = normalise(rows, detect(rows))           # one canonical form for each shape
    data = encode(rows, tokenizer, 512)            # data.rows: {"input_ids", "labels"}, label -100 = not trained
    batches = DataLoader(pack(data.rows, 512), batch_size=8, collate_fn=Collator(tokenizer.pad_token_id))

Labels are not shifted (transformers' models do that), so the label of the first token of a row is never used, and a
token counts as trained only from the second on.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, takewhile
from pathlib import Path
from typing import Any

import torch

from lorakit.errors import LorakitError, extra, near

Row = dict[str, Any]
IGNORED = -100
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md", ".rst", ".py")
_NAME = r"[A-Za-z0-9][\w.-]*"
HUB = re.compile(rf"{_NAME}/{_NAME}(:{_NAME})?|{_NAME}:{_NAME}")

# ---- reading ---------------------------------------------------------------------------------------------------


def read_rows(source: str | Path, split: str | None = None, limit: int | None = None) -> list[Row]:
    """The rows of a file, of all files in a folder, or of a data set on the hub, as plain dicts.

    .jsonl: a JSON value a line. .json: a list, or {split: list}. .csv .tsv: with a header; all values are strings.
    .parquet. .txt .md .rst .py: one row {"text": whole file}, but a .txt with exactly one `||` in every line (the E2E
    data) gives {"prompt", "completion"} rows. A JSON string is a {"text"} row, a pair [text, label] a {"text", "label"}
    row. A folder: its files and subfolders in sorted order, without hidden files, and without README* and LICENSE* if
    there are others; if some files are named `split`, only those. Hub: `owner/name`, with or without `:config`.

    split: the list of a .json, the split of a hub data set, the file name in a folder; default the only one, or "train"
    limit: at most so many rows, from the start
    Raises LorakitError: nothing there, broken or empty file (with line and column), unknown split, missing package.
    """
    if limit is not None and limit < 1:
        raise LorakitError(f"limit={limit} leaves no rows; mend: limit=1 or more, or None for all rows")
    path, name = Path(source).expanduser(), str(source)
    if path.is_dir():
        rows = _read_folder(path, split)
    elif path.exists():
        rows = _read_file(path, split)
    elif HUB.fullmatch(name) and path.suffix.lower() not in SUFFIXES and not ("/" in name and path.parent.is_dir()):
        rows = _read_hub(name, split, limit)
    else:
        raise _missing(path)
    if not rows:
        raise LorakitError(f"{source}: empty, there are no rows in it; mend: check that it is the right file")
    return rows[:limit]


def _missing(path: Path) -> LorakitError:
    """The error for a path that does not exist: the first part of it that is missing, and what is there instead."""
    folder = next(p for p in path.absolute().parents if p.is_dir())
    part = path.absolute().parts[len(folder.parts)]
    hint = near(part, sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")))
    return LorakitError(f"{path}: no such file, folder or hub name: there is no `{part}` in {folder}{hint}")


def _read_folder(folder: Path, split: str | None) -> list[Row]:
    inside = ((p, p.relative_to(folder).parts) for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES)
    found = [p for p, parts in inside if p.is_file() and not any(s.startswith((".", "__pycache__")) for s in parts)]
    files = [p for p in found if not p.name.upper().startswith(("README", "LICENSE"))] or found
    if not files:
        raise LorakitError(f"{folder}: no file to read in this folder; can be read: {' '.join(SUFFIXES)}")
    stems = {p.stem for p in files if p.suffix.lower() != ".json"}  # a .json can hold splits, the others are one
    if split and any(p.stem == split for p in files):
        files, split = [p for p in files if p.stem == split], None
    elif split and stems:
        raise LorakitError(f"{folder}: there is no file of the split `{split}`{near(split, sorted(stems))}")
    return [row for path in files for row in _read_file(path, split)]


def _read_file(path: Path, split: str | None) -> list[Row]:
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise LorakitError(f"{path}: cannot read a `{kind or 'no suffix'}` file; can be read: {' '.join(SUFFIXES)}")
    if split and kind != ".json":
        raise LorakitError(f"{path}: a {kind} file has no splits; mend: leave out split={split!r}")
    if kind == ".parquet":
        return _read_parquet(path)
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise LorakitError(f"{path}:{line}: not UTF-8 at byte {e.start}; mend: save the file as UTF-8") from e
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return []
    if kind == ".jsonl":
        return [_json_row(_loads(line, path, n), f"{path}:{n}") for n, line in lines]
    if kind == ".json":
        return _json_rows(path, _loads(text, path), split)
    if kind in (".csv", ".tsv"):
        return _table_rows(path, text, "," if kind == ".csv" else "\t")
    if kind == ".txt" and all(line.count("||") == 1 for _, line in lines):
        pairs = (line.split("||") for _, line in lines)
        return [{"prompt": left.strip(), "completion": right.strip()} for left, right in pairs]
    return [{"text": text}]


def _loads(text: str, path: Path, line: int = 1) -> Any:
    """The JSON value of `text`, which begins at this line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        hint = ", or name the file .jsonl if every line is an object" if path.suffix.lower() == ".json" else ""
        where = f"{path}:{line + e.lineno - 1}:{e.colno}"
        raise LorakitError(f"{where}: broken JSON, {e.msg}; mend: correct it at column {e.colno}{hint}") from e


def _json_row(value: Any, where: str) -> Row:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
        return {"text": value[0], "label": value[1]}
    raise LorakitError(f"{where}: a row must be an object, a string or a pair [text, label], not {str(value)[:40]}")


def _json_rows(path: Path, data: Any, split: str | None) -> list[Row]:
    where = str(path)
    if isinstance(data, dict) and {"messages", "conversations"} & data.keys():
        data = [data]  # one conversation, not splits
    if isinstance(data, dict) and (lists := {k: v for k, v in data.items() if isinstance(v, list)}):
        split = _choose(lists, split, where)
        data, where = lists[split], f"{where}, split `{split}`"
    elif split:
        raise LorakitError(f"{path}: the file has no splits; mend: leave out split={split!r}")
    if not isinstance(data, list):
        raise LorakitError(f"{path}: must be a list of rows or {{split: list of rows}}, not {str(data)[:40]}")
    return [_json_row(value, f"{where}, row {n}") for n, value in enumerate(data, 1)]


def _choose(splits: Iterable[str], split: str | None, where: str) -> str:
    names = list(splits)
    if split and split not in names:
        raise LorakitError(f"{where}: there is no split `{split}`{near(split, names)}")
    chosen = split or ("train" if "train" in names else names[0])
    if not split and chosen != "train" and len(names) > 1:
        raise LorakitError(f"{where}: it has the splits {', '.join(names)}; mend: choose one, split={names[0]!r}")
    return chosen


def _table_rows(path: Path, text: str, delimiter: str) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a text longer than 128 KiB
    reader, rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), []
    try:
        for row in reader:
            heads = len(reader.fieldnames or ())
            n = heads + len(row.get(None, ())) - sum(v is None for v in row.values())
            if n != heads:
                raise LorakitError(
                    f"{path}:{reader.line_num}: {n} fields, but the header has {heads}; mend: put a field that holds "
                    f"{delimiter!r} or a line break in double quotes"
                )
            rows.append(row)
    except csv.Error as e:
        raise LorakitError(f"{path}:{reader.line_num + 1}: broken table, {e}; mend: balance the double quotes") from e
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise extra("pyarrow", "train") from e
    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as e:
        raise LorakitError(f"{path}: not a readable parquet file, {e}; mend: write or download it again") from e


def _read_hub(source: str, split: str | None, limit: int | None) -> list[Row]:
    """Rows of a data set on the hub; the numbers of a class label become its names."""
    try:
        import datasets
    except ImportError as e:
        raise extra("datasets", "train") from e
    name, _, config = source.partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except Exception as e:  # network, hub and the data set's own files each fail in their own way
        raise LorakitError(
            f"{source}: there is no such path, and as a data set of the hub it did not load, {type(e).__name__}: {e}; "
            "mend: correct the name, or go online"
        ) from e
    data = data[_choose(data, split, source)] if isinstance(data, dict) else data
    rows = data.select(range(min(limit or len(data), len(data)))).to_list()
    for column, feature in data.features.items():
        if isinstance(feature, datasets.ClassLabel):
            for row in rows:
                number = row[column]
                row[column] = None if number is None or number < 0 else feature.names[number]
    return rows


# ---- shapes ----------------------------------------------------------------------------------------------------

SHAPES: dict[str, list[tuple[str, ...]]] = {  # shape: the sets of columns that make it, in the order of trying
    "messages": [("messages",)],
    "sharegpt": [("conversations",)],
    "preference": [("chosen", "rejected")],
    "alpaca": [("instruction", "output"), ("instruction", "response")],
    "prompt_completion": [("prompt", "completion"), ("question", "answer"), ("input", "output"),
                          ("prompt", "response"), ("query", "response"), ("source", "target")],
    "classification": [(t, c) for t in ("text", "sentence", "utterance") for c in ("label", "intent", "class")],
    "text": [("text",), ("content",)],
}  # fmt: skip
ROLES = {r: r for r in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}
ALPACA = (
    "You are given a task{more}. Write an answer that fulfils it.\n\n### Instruction:\n{instruction}\n\n"
    "{input}### Response:\n"
)


def detect(rows: Sequence[Row], columns: dict[str, str] | None = None) -> str:
    """The shape of the rows, a key of SHAPES, told by the columns of the first row.

    columns: {our name: your column}, e.g. {"prompt": "my_column"}
    Raises LorakitError, with the columns found and the accepted ones, if there is no row or no shape fits.
    """
    if not rows:
        raise LorakitError("there are no rows whose shape could be told; mend: check the source of the data")
    row = _renamed(rows[0], columns, "row 1")
    for shape in SHAPES:
        if _columns(row, shape):
            return shape
    raise LorakitError(f"row 1: cannot tell what the columns {_list(row)} mean; {_accepted()}")


def normalise(rows: Sequence[Row], shape: str, columns: dict[str, str] | None = None) -> list[Row]:
    """Canonical rows: {"messages": [{"role", "content"}]}, {"prompt", "completion"}, {"prompt", "chosen", "rejected"}
    (three strings or three lists of messages), {"text", "label"} (strings) or {"text"}; other columns are left out.

    shape: what `detect` says; "sharegpt" becomes messages, "alpaca" becomes prompt and completion
    columns: {our name: your column}, as for `detect`
    Raises LorakitError with the number of the row (from 1) that lacks a field or has something else in it.
    """
    if shape not in SHAPES:
        raise LorakitError(f"unknown shape `{shape}`{near(shape, SHAPES)}")
    out: list[Row] = []
    names: tuple[str, ...] | None = None
    for n, row in enumerate(rows, 1):
        row = _renamed(row, columns, f"row {n}")
        names = names or _columns(row, shape)
        if not names:
            raise LorakitError(f"row {n}: the columns {_list(row)} do not make the shape `{shape}`; {_accepted(shape)}")
        for name in names:
            if row.get(name) is None:
                raise LorakitError(
                    f"row {n}: `{name}` is missing or null; found {_list(row)}; mend: fill it in or drop the row"
                )
        out.append(_build(shape, row, names, f"row {n}"))
    return out


def _columns(row: Row, shape: str) -> tuple[str, ...] | None:
    return next((names for names in SHAPES[shape] if all(name in row for name in names)), None)


def _renamed(row: Row, columns: dict[str, str] | None, where: str) -> Row:
    for name, yours in (columns or {}).items():
        if yours not in row:
            raise LorakitError(f"{where}: there is no column `{yours}` to use as `{name}`{near(yours, row)}")
    return row | {name: row[yours] for name, yours in (columns or {}).items()}


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "(none)"


def _accepted(shape: str | None = None) -> str:
    sets = [" + ".join(names) for s in SHAPES if shape in (s, None) for names in SHAPES[s][: None if shape else 3]]
    return f"accepted are {'; '.join(sets)}; mend: rename them, e.g. columns={{'prompt': 'my_column'}}"


def _build(shape: str, row: Row, names: tuple[str, ...], where: str) -> Row:
    if shape in ("messages", "sharegpt"):
        return {"messages": _messages(row[names[0]], f"{where}: `{names[0]}`")}
    if shape == "preference":
        return _preference(row, where)
    values = [_text(row[name], f"{where}: `{name}`") for name in names]
    if shape == "alpaca":
        given = _text(row.get("input") or row.get("context") or "", f"{where}: `input`")
        more, given = (", and what it is about", f"### Input:\n{given}\n\n") if given else ("", "")
        return {"prompt": ALPACA.format(more=more, instruction=values[0], input=given), "completion": values[1]}
    keys = {"prompt_completion": ("prompt", "completion"), "classification": ("text", "label"), "text": ("text",)}
    return dict(zip(keys[shape], values, strict=True))


def _text(value: Any, where: str) -> str:
    if isinstance(value, str | int | float):
        return str(value)
    raise LorakitError(f"{where} must be text, not {type(value).__name__} {str(value)[:40]}")


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    """[{"role", "content"}] from the keys and roles of OpenAI or ShareGPT; a content of text parts is joined."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise LorakitError(f"{where} must be a list of {{role, content}}, not {str(value)[:40]}")
    out = []
    for n, turn in enumerate(value, 1):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in ROLES:
            raise LorakitError(f"{where}, message {n}: unknown role `{role}`{near(str(role), ROLES)}")
        if isinstance(content, list) and all(isinstance(p, dict) and "text" in p for p in content):
            content = "".join(p["text"] for p in content)
        out.append({"role": ROLES[role], "content": _text(content, f"{where}, message {n}: its content")})
    return out


def _preference(row: Row, where: str) -> Row:
    """Three strings (no prompt is ""), or three lists of messages, the prompt taken out of the answers."""
    sides = {name: row.get(name) for name in ("prompt", "chosen", "rejected")}
    sides["prompt"] = "" if sides["prompt"] is None else sides["prompt"]
    if not any(isinstance(value, list) for value in sides.values()):
        return {name: _text(value, f"{where}: `{name}`") for name, value in sides.items()}
    for name, value in sides.items():
        if isinstance(value, str):
            role = "user" if name == "prompt" else "assistant"
            sides[name] = [{"role": role, "content": value}] if value else []
        sides[name] = _messages(sides[name], f"{where}: `{name}`") if sides[name] else []
    prompt, chosen, rejected = sides.values()
    shared = [a for a, _ in takewhile(lambda p: p[0] == p[1], zip(chosen[:-1], rejected[:-1], strict=False))]
    prompt = prompt or shared
    cut = len(prompt) if shared[: len(prompt)] == prompt else 0
    if not chosen or not rejected:
        raise LorakitError(f"{where}: an answer is an empty list; mend: drop the row")
    return {"prompt": prompt, "chosen": chosen[cut:], "rejected": rejected[cut:]}


# ---- tokens ----------------------------------------------------------------------------------------------------

CHAT = (  # the layout of a conversation for a tokenizer that has no chat template
    "{% for m in messages %}{{ '### ' + m['role'] | capitalize + ':\\n' + m['content'] }}"
    "{{ (eos_token if m['role'] == 'assistant' else '') + '\\n\\n' }}{% endfor %}"
    "{{ '### Assistant:\\n' if add_generation_prompt else '' }}"
)
_MARK = "\ue000\ue001"  # private characters: stand in for an answer, and mark what is trained in a preview


@dataclass(frozen=True)
class Encoded:
    """Rows of token ids, and what became of the rows of text.

    rows: [{"input_ids": list[int], "labels": list[int] as long, or one int for a class}]
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
        pieces = _pieces(ids, answer if answer_only else [True] * len(ids), max_length)
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
        raise LorakitError(f"{where}: a template is for prompt and completion, found {_list(row)}; mend: leave it out")
    if "messages" in row:
        return _chat_tokens(row["messages"], tokenizer, where)
    if "text" in row and "label" not in row:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        first = [bos] if bos is not None and (bos != eos or _adds_bos(tokenizer)) else []
        ids = first + _ids(tokenizer, row["text"]) + ([] if eos is None else [eos])
        return ids, [True] * len(ids)
    mend = "normalise(rows, shape) first; encode_labels for classes; prompt + chosen and prompt + rejected one by one"
    raise LorakitError(f"{where}: cannot encode the columns {_list(row)}; mend: {mend}")


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
        marked = [*messages[:k], turn | {"content": _MARK}, *messages[k + 1 :]]
        before, found, after = _render(marked, tokenizer, where).partition(_MARK)
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
            f"row {bad}: needs `text` and `label`, found {_list(rows[bad - 1])}; mend: normalise the rows"
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
            encoded.append({"input_ids": ids, "labels": number[label]})
    if not encoded:
        raise LorakitError("nothing to train: every text is empty; mend: check the column of the text")
    return _encoded(encoded, len(rows) - len(encoded), truncated), names


# ---- batches ---------------------------------------------------------------------------------------------------


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
    padding of a packed row is a piece of its own. pad_to_multiple_of rounds the width up.
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
            text += f"{_MARK[0]}{piece}{_MARK[1]}" if on else piece
        note = f"class {labels}" if isinstance(labels, int) else f"{sum(flags)} trained"
        out += [f"row {number}: {len(ids)} tokens, {note}", *_lines(text, width, rich)]
    return "\n".join(out)


def _lines(text: str, width: int, rich: bool) -> list[str]:
    lines, on = [], False
    for i in range(0, len(text), width):
        line = ""
        for part in re.split(f"([{_MARK}])", text[i : i + width]):
            if part and part in _MARK:
                on = part == _MARK[0]
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
