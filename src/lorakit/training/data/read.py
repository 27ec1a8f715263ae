"""Rows from files, folders and the hub, as plain dicts."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, extra, near

Row = dict[str, Any]
IGNORED = -100
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md", ".rst", ".py")
_NAME = r"[A-Za-z0-9][\w.-]*"
HUB = re.compile(rf"{_NAME}/{_NAME}(:{_NAME})?|{_NAME}:{_NAME}")


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
