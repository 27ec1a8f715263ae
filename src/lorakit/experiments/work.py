"""One cell with one seed, in a process of its own: only so is its peak memory its own, and its failure not the others'."""

from __future__ import annotations

import math
import os
import shutil
import sys
import threading
import time
import traceback
from contextlib import suppress
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from lorakit.errors import LorakitError
from lorakit.experiments.config import Trial
from lorakit.formats.files import writing
from lorakit.models import load_base
from lorakit.training import data as d
from lorakit.training import run as r
from lorakit.training.measure import evaluate
from lorakit.training.prepare import Prepared, prepare


class Stopwatch(TrainerCallback):
    """Seconds inside steps, so without evaluation and saving, the tokens that were really trained on, padding not counted, and peak memory."""

    def __init__(self, limit: float = math.inf):
        self.limit, self.seconds, self.tokens, self.since, self.handle = limit, 0.0, 0, 0.0, None
        self.peak = 0

    def on_train_begin(self, args, state, control, model=None, **kw):
        forget_peak()
        self.handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def on_train_end(self, args, state, control, **kw):
        self.handle.remove()
        self.peak = peak_memory()

    def _count(self, model: nn.Module, args: tuple, kw: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            mask, ids = kw.get("attention_mask"), kw.get("input_ids", args[0] if args else None)
            self.tokens += int(mask.sum()) if mask is not None else ids.numel()

    def on_step_begin(self, args, state, control, **kw):
        self.since = _now()

    def on_step_end(self, args, state, control, **kw):
        self.seconds += _now() - self.since
        control.should_training_stop = control.should_training_stop or self.seconds >= self.limit


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


def _untouched(run: r.Run) -> dict[str, Any]:
    p = prepare(run)
    extra = {"num_labels": len(p.labels), "pad_token_id": p.tokenizer.pad_token_id} if p.labels else {}
    torch.manual_seed(run.train.seed)
    model = load_base(run.base.path, p.task, dtype=run.base.dtype, revision=run.base.revision, trust_remote_code=run.base.trust_remote_code, **extra)
    if torch.cuda.is_available():
        model.to("cuda")
    forget_peak()
    found = evaluate(model, p)
    return {"metrics": {"before": found, "after": found}, "steps": 0, "tokens": 0, "train_seconds": 0.0, "tokens_per_second": None,
            "peak_memory_bytes": peak_memory(), "trainable": 0, "adapter_bytes": 0, "verify": None}


def _trained(trial: Trial) -> dict[str, Any]:
    run, watch = trial.run, Stopwatch(trial.budget.get("seconds", math.inf))
    if "tokens" in trial.budget:
        run = run.model_copy(update={"train": run.train.model_copy(update={"max_steps": steps_for(prepare(run), int(trial.budget["tokens"]))})})
    record = r.train(run, callbacks=[watch])
    cost = record["cost"]
    return {"metrics": record["metrics"], "steps": cost["steps"], "tokens": watch.tokens, "train_seconds": watch.seconds,
            "tokens_per_second": watch.tokens / watch.seconds, "peak_memory_bytes": watch.peak, "threads": cost["threads"],
            "device": cost["device"], "trainable": record["adapter"]["trainable"], "adapter_bytes": record["adapter"]["bytes"],
            "verify": record["verify"]["ok"]}


def one(trial: Trial, digest: str) -> None:
    """Runs a trial in its folder and writes `result.json`, also when it fails; what it says goes to `log.txt`."""
    _end_with_parent()
    out = trial.folder
    with (out / "log.txt").open("w", buffering=1, encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        head = {"cell": trial.cell, "seed": trial.seed, "digest": digest}
        try:
            if trial.run.train.threads:
                torch.set_num_threads(trial.run.train.threads)
            result = head | {"status": "ok", "error": None} | (_untouched(trial.run) if trial.untouched else _trained(trial))
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
