"""One cell with one seed, in a process of its own: only so is its peak memory its own, and its failure not the others'."""

from __future__ import annotations

import math
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from lorakit import api
from lorakit.errors import LorakitError
from lorakit.experiments import measure, plain
from lorakit.experiments.config import Trial
from lorakit.experiments.locks import claimed
from lorakit.formats.files import read_json, writing
from lorakit.formats.folder import Folder
from lorakit.training import data as d
from lorakit.training import run as r
from lorakit.training.base import reread
from lorakit.training.measure import evaluate
from lorakit.training.prepare import Prepared, prepare


class Stopwatch(TrainerCallback):
    """Seconds inside steps, so without evaluation and saving, the tokens that were really trained on, padding not counted, and peak memory.

    `around` is measured before the first step and after the last one, outside of all these.
    """

    def __init__(self, limit: float = math.inf, around: Callable[[nn.Module], dict[str, Any]] = lambda model: {}):
        self.limit, self.around, self.seconds, self.cpu, self.tokens, self.since, self.handle = limit, around, 0.0, 0.0, 0, (0.0, 0.0), None
        self.peak, self.saved, self.first, self.steps = 0, None, None, 0
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, model=None, **kw):
        self.before = self.around(model)
        forget_peak()
        self.handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def on_train_end(self, args, state, control, model=None, **kw):
        self.handle.remove()
        self.peak = peak_memory()
        if self.first is not None:
            self.saved = measure.saved_bytes(model, self.first)
        self.after = self.around(model)

    def _count(self, model: nn.Module, args: tuple, kw: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            self.first = self.first or (None if args else dict(kw))
            mask, ids = kw.get("attention_mask"), kw.get("input_ids", args[0] if args else None)
            self.tokens += int(mask.sum()) if mask is not None else ids.numel()

    def on_step_begin(self, args, state, control, **kw):
        self.since = _now(), time.process_time()

    def on_step_end(self, args, state, control, **kw):
        self.seconds += _now() - self.since[0]
        self.cpu += time.process_time() - self.since[1]
        self.steps = state.global_step
        control.should_training_stop = control.should_training_stop or self.seconds >= self.limit


class Stopped(Exception):
    """Early stopping ended the run."""


class Asked(TrainerCallback):
    """Tells another process each evaluation and asks it whether to go on: (number of the evaluation, step, metrics) out, a yes to stopping in.

    The schedule is that of the whole run until then, so a run that is let go on is the run that nobody asks about.
    """

    def __init__(self, line: connection.Connection):
        self.line, self.n, self.over = line, 0, False

    def on_train_end(self, args, state, control, **kw):
        self.over = True

    def on_log(self, args, state, control, logs=None, **kw):
        found = {k: v for k, v in (logs or {}).items() if k.startswith("eval_")}
        if found and not self.over:
            self.n += 1
            self.line.send((self.n, state.global_step, found))
            if self.line.recv() and state.global_step < state.max_steps:
                raise Stopped


def forget_peak() -> None:
    """What was used until now, for reading the data for instance, no longer counts."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux alone can forget a process's peak
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes: the GPU's peak where there is one, else the process's peak resident size since `forget_peak`, or ever where that cannot be told."""
    if not torch.cuda.is_available():
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    return r.peak_memory()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def steps_for(p: Prepared, tokens: int) -> int:
    """The steps after which the trainer has seen at least so many tokens, counted in the order in which it will see them."""
    length = p.run.data.max_length or max(len(row["input_ids"]) for row in p.train.rows)
    rows = d.pack(p.train.rows, length) if p.run.data.packing else p.train.rows
    sizes = r._Rows([{"size": len(row["input_ids"])} for row in rows])
    trainer = Trainer(model=nn.Linear(1, 1), args=r.arguments(p.run, len(rows)), train_dataset=sizes,
                      data_collator=lambda some: {"size": torch.tensor([s["size"] for s in some])})
    loader, seen, steps = trainer.get_train_dataloader(), 0, 0
    for epoch in range(tokens):
        loader.set_epoch(epoch)
        batches = [int(b["size"].sum()) for b in loader]
        for n in range(0, len(batches), p.run.train.gradient_accumulation_steps):
            seen, steps = seen + sum(batches[n : n + p.run.train.gradient_accumulation_steps]), steps + 1
            if seen >= tokens:
                return steps
    raise LorakitError(f"{tokens} tokens cannot be reached with this data")


def _around(trial: Trial, p: Prepared) -> Callable[[nn.Module], dict[str, Any]]:
    """What is measured before and after beside the run's own metrics."""
    other = measure.Elsewhere(trial.run, trial.forgetting, p) if trial.forgetting else None
    return lambda model: measure.extras(trial.extra, model, p) | ({"elsewhere": other.loss(model)} if other else {})


def _untouched(trial: Trial, p: Prepared) -> dict[str, Any]:
    model = plain.bare(p)
    forget_peak()
    found = evaluate(model, p)
    peak = peak_memory()
    more = _around(trial, p)(model)
    other = more.pop("elsewhere", None)
    return {"metrics": {"before": found | more, "after": found | more}, "steps": 0, "tokens": 0, "train_seconds": 0.0, "cpu_seconds": 0.0,
            "tokens_per_second": None, "peak_memory_bytes": peak, "saved_bytes": None, "trainable": 0, "adapter_bytes": 0, "merge_loss": None,
            "elsewhere": None if other is None else {"before": other, "after": other}, "threads": torch.get_num_threads(),
            "device": "cuda" if torch.cuda.is_available() else "cpu", "verify": None}


def _trained(trial: Trial, p: Prepared, line: connection.Connection | None = None) -> dict[str, Any]:
    run, watch = trial.run, Stopwatch(trial.budget.get("seconds", math.inf), _around(trial, p))
    if "tokens" in trial.budget:
        run = run.model_copy(update={"train": run.train.model_copy(update={"max_steps": steps_for(p, int(trial.budget["tokens"]))})})
    if trial.kind == "lorakit":
        try:
            record = r.train(run, callbacks=[watch, *([Asked(line)] if line else [])])
        except Stopped:
            return {"status": "stopped", "steps": watch.steps, "tokens": watch.tokens, "train_seconds": watch.seconds, "cpu_seconds": watch.cpu,
                    "threads": torch.get_num_threads()}
        record["merge_loss"] = _merge_loss(run, p) if trial.counts else None
    else:
        record = plain.train(trial.kind, trial.peft, run, watch)
    cost = record["cost"]
    metrics = {k: record["metrics"][k] | {n: v for n, v in more.items() if n != "elsewhere"} for k, more in (("before", watch.before), ("after", watch.after))}
    other = {k: more["elsewhere"] for k, more in (("before", watch.before), ("after", watch.after)) if "elsewhere" in more}
    return {"metrics": metrics, "steps": cost["steps"], "tokens": watch.tokens, "train_seconds": watch.seconds, "cpu_seconds": watch.cpu,
            "tokens_per_second": watch.tokens / watch.seconds, "peak_memory_bytes": watch.peak, "saved_bytes": watch.saved, "threads": cost["threads"],
            "device": cost["device"], "trainable": record["adapter"]["trainable"], "adapter_bytes": record["adapter"]["bytes"],
            "merge_loss": record.get("merge_loss"), "elsewhere": other or None, "verify": record["verify"]["ok"]}


def _merge_loss(run: r.Run, p: Prepared) -> float | None:
    """Of the saved adapter, on a base read anew; None for what cannot be merged."""
    folder = Folder(Path(run.output) / "adapter")
    model = reread(run, folder)
    api.load(model, folder.path)
    live = measure.logits(model, p)
    try:
        api.merge(model)
    except LorakitError as e:
        print(f"not merged: {e}")
        return None
    return measure.merge_loss(live, measure.logits(model, p))


def one(trial: Trial, digest: str, settings: dict[str, Any], threads: int | None = None, line: connection.Connection | None = None) -> None:
    """Runs a trial in its folder and writes `result.json`, also when it fails; what it says goes to `log.txt`. Nothing where another process has it.

    line: to the process that may stop it at an evaluation (`Asked`).
    """
    _end_with_parent()
    with claimed(trial.folder) as mine:
        if mine and not finished(trial, digest):
            _one(trial, trial.head(digest), settings, threads, line)


def finished(trial: Trial, digest: str | None = None) -> dict[str, Any] | None:
    """The result of a trial that ended well, with these settings where a digest is given."""
    result = outcome(trial)
    return result if result and result["status"] == "ok" and digest in (None, result["digest"]) else None


def outcome(trial: Trial) -> dict[str, Any] | None:
    """What `result.json` holds; None where there is none, also when another process takes it away just now."""
    path = trial.folder / "result.json"
    try:
        return read_json(path) if path.is_file() else None
    except LorakitError:
        if path.is_file():
            raise
        return None


def _one(trial: Trial, head: dict[str, Any], settings: dict[str, Any], threads: int | None, line: connection.Connection | None) -> None:
    out = trial.folder
    shutil.rmtree(out, ignore_errors=True)
    with writing(out) as w:
        w.json("cell.json", head | {"settings": settings})
    with (out / "log.txt").open("w", buffering=1, encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            if trial.run.train.threads or threads:
                torch.set_num_threads(trial.run.train.threads or threads)
            p = prepare(trial.run)
            result = head | {"status": "ok", "error": None, "kind": trial.kind} | (_untouched(trial, p) if trial.untouched else _trained(trial, p, line))
        except Exception as e:
            traceback.print_exc()
            result = head | {"status": "failed", "error": str(e) if isinstance(e, LorakitError) else f"{type(e).__name__}: {e}"}
        sys.stdout.flush()
        sys.stderr.flush()
    with writing(out) as w:
        w.json("result.json", result)
    for left in out.glob("checkpoint-*"):
        shutil.rmtree(left, ignore_errors=True)


def _end_with_parent() -> None:
    """A comparison that is killed takes its running cell with it, so that the next one finds the folder quiet."""
    def watch() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    if parent_process() is not None:
        threading.Thread(target=watch, daemon=True).start()
