"""The kinds of training data, told apart by their columns and brought into one form each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from lorakit.errors import LorakitError, near
from lorakit.training.data.read import Row

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
    raise LorakitError(f"row 1: cannot tell what the columns {listed(row)} mean; {_accepted()}")


def normalise(rows: Sequence[Row], shape: str, columns: dict[str, str] | None = None, keep: Sequence[str] = ()) -> list[Row]:
    """Canonical rows: {"messages": [{"role", "content"}]}, {"prompt", "completion"}, {"prompt", "chosen", "rejected"}
    (three strings or three lists of messages), {"text", "label"} (strings) or {"text"}; other columns than those to `keep` are left out.

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
            raise LorakitError(f"row {n}: the columns {listed(row)} do not make the shape `{shape}`; {_accepted(shape)}")
        for name in (*names, *keep):
            if row.get(name) is None:
                raise LorakitError(
                    f"row {n}: `{name}` is missing or null; found {listed(row)}; mend: fill it in or drop the row"
                )
        out.append(_build(shape, row, names, f"row {n}") | {name: row[name] for name in keep})
    return out


def _columns(row: Row, shape: str) -> tuple[str, ...] | None:
    return next((names for names in SHAPES[shape] if all(name in row for name in names)), None)


def _renamed(row: Row, columns: dict[str, str] | None, where: str) -> Row:
    for name, yours in (columns or {}).items():
        if yours not in row:
            raise LorakitError(f"{where}: there is no column `{yours}` to use as `{name}`{near(yours, row)}")
    return row | {name: row[yours] for name, yours in (columns or {}).items()}


def listed(names: Iterable[str]) -> str:
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


def side(row: Row, name: str) -> Row:
    """One answer (`chosen` or `rejected`) of a preference pair as an ordinary canonical row."""
    if isinstance(row[name], list):
        prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        return {"messages": [*prompt, *row[name]]}
    return {"prompt": row["prompt"], "completion": row[name]}
