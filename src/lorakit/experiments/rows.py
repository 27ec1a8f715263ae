"""Rows that judge a choice and neither train nor end in the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorakit.formats.files import writing
from lorakit.training.prepare import Prepared, _hold_out


def apart(p: Prepared, fraction: float, seed: int, folder: Path) -> dict[str, Any]:
    """Writes a run's training rows into `folder`, a part of them held out, and returns what a run's `data` has to say to use them."""
    run = p.run.model_copy(update={"data": p.run.data.model_copy(update={"eval_fraction": fraction, "split_seed": seed})})
    rows, held = _hold_out(p.rows, p.shape, run)
    if p.labels:  # a class that only the judging rows have could not be learnt
        known = {row["label"] for row in rows}
        rows, held = rows + [row for row in held if row["label"] not in known], [row for row in held if row["label"] in known]
    texts = {name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some) for name, some in (("train.jsonl", rows), ("judge.jsonl", held))}
    if any(not (folder / n).is_file() or (folder / n).read_text(encoding="utf-8") != text for n, text in texts.items()):
        with writing(folder) as w:
            for n, text in texts.items():
                w.text(n, text)
    shape = {"sharegpt": "messages", "alpaca": "prompt_completion"}.get(p.shape, p.shape)
    return {"train": str(folder / "train.jsonl"), "eval": str(folder / "judge.jsonl"), "shape": shape, "columns": {}, "split": None, "eval_split": None,
            "limit": None, "eval_limit": None, "eval_fraction": 0.1, "split_seed": None}
