"""The data of a run: read, told apart, split, encoded, described. No model is loaded here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorakit.errors import LorakitError
from lorakit.hooks import Hook, build
from lorakit.models import load_tokenizer
from lorakit.training import data as d
from lorakit.training.config import Run


@dataclass
class Prepared:
    """Everything before the first step."""

    run: Run
    tokenizer: Any
    shape: str
    task: str
    rows: list[dict]
    held: list[dict]
    train: d.Encoded
    heldout: d.Encoded | None
    labels: list[str] | None
    lineage: list[dict] = field(default_factory=list)


def prepare(run: Run) -> Prepared:
    """Reads, tells apart, splits and encodes the data. Raises LorakitError before any model is loaded."""
    rows = d.read_rows(run.data.train, run.data.split, run.data.limit)
    shape = d.detect(rows, run.data.columns or None) if run.data.shape == "auto" else run.data.shape
    tasks = of_tasks(run)
    rows = d.normalise(rows, shape, run.data.columns or None, ("task",) if tasks else ())
    if tasks:
        rows = _numbered(rows, shape, run, tasks)
    held: list[dict] = []
    if run.data.eval:
        held = d.normalise(d.read_rows(run.data.eval, run.data.eval_split, run.data.eval_limit), shape, run.data.columns or None)
    elif run.data.eval_fraction:
        rows, held = _hold_out(rows, shape, run)
    held = [{k: v for k, v in row.items() if k != "task"} for row in held[: run.data.eval_limit]]
    task = run.task
    if task == "auto":
        task = "sequence-classification" if shape == "classification" else "causal-lm"
    if (task == "sequence-classification") != (shape == "classification"):
        raise LorakitError(f"task {task} does not fit data of shape {shape}; mend: leave task at auto, or rename the columns (data.columns)")
    if run.eval.metrics and (task == "sequence-classification" or shape == "text"):
        raise LorakitError(f"eval.metrics: {run.eval.metrics[0]} needs rows with an answer to generate, this data is of shape {shape}; mend: leave it out")
    tok = load_tokenizer(run.base.path, run.base.revision, run.base.trust_remote_code)
    length = run.data.max_length or min(getattr(tok, "model_max_length", 1024) or 1024, 1024)
    labels = None
    if task == "sequence-classification":
        train, labels = d.encode_labels(rows, tok, length)
        heldout = d.encode_labels(held, tok, length, labels)[0] if held else None
    else:
        plain = (lambda some: [d.side(r, "chosen") for r in some]) if shape == "preference" else list
        train = d.encode(plain(rows), tok, length, run.data.answer_only, run.data.template)
        heldout = d.encode(plain(held), tok, length, run.data.answer_only, run.data.template) if held else None
    return Prepared(run, tok, shape, task, rows, held, train, heldout, labels)


def of_tasks(run: Run) -> Hook | None:
    """The hook that takes the rows of tasks apart, where the run has one."""
    return next((h for h in map(build, run.hooks) if h.tasks), None)


def _numbered(rows: list[dict], shape: str, run: Run, hook: Hook) -> list[dict]:
    """The rows with the place of their task among the sorted names as its number, for a hook that takes tasks apart."""
    if run.data.packing or shape == "preference":
        raise LorakitError(f"{hook.name} takes the rows of tasks apart, which {'packing joins' if run.data.packing else 'pairs of answers do not allow'}; "
                           f"mend: {'packing: false' if run.data.packing else 'another shape of data, or no such hook'}")
    names = sorted({str(row["task"]) for row in rows}, key=lambda name: (len(name), name) if name.isdigit() else (0, name))
    if len(names) != hook.tasks:
        raise LorakitError(f"{hook.name}: the data has {len(names)} tasks ({', '.join(names[:8])}), the hook {hook.tasks}; mend: {hook.name}: "
                           f"{{tasks: {len(names)}}}" if len(names) > 1 else f"{hook.name}: the column `task` names one task alone; mend: two or more")
    return [row | {"task": names.index(str(row["task"]))} for row in rows]


def _hold_out(rows: list[dict], shape: str, run: Run) -> tuple[list[dict], list[dict]]:
    if shape == "text" and len(rows) == 1:  # one long text: its end is held out
        text = rows[0]["text"]
        cut = text.rfind("\n", 0, int(len(text) * (1 - run.data.eval_fraction))) + 1 or int(len(text) * (1 - run.data.eval_fraction))
        return [{"text": text[:cut]}], [{"text": text[cut:]}]
    return d.split(rows, run.data.eval_fraction, run.train.seed if run.data.split_seed is None else run.data.split_seed)


def describe(p: Prepared) -> str:
    """The data in a few lines: what was found, how much, and the first rows with what is trained marked."""
    e = p.train
    held = f", {len(p.held)} held out" if p.held else ", none held out"
    lost = f"; {e.dropped} dropped, {e.truncated} truncated" if e.dropped or e.truncated else ""
    return (f"data: {p.shape}, {len(p.rows)} rows{held}, {e.tokens:,} tokens of which {e.trained_tokens:,} trained{lost}\n"
            + d.preview(p.train.rows, p.tokenizer, 3))
