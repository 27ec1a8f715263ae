"""One run: data → base → adapter → before → training → after → saved, read back, verified → report.

    runs/x/config.yaml  run.json  report.html  loss.png  adapter/  checkpoint-*/
"""

from __future__ import annotations

import datetime
import gc
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import PrinterCallback, SchedulerType, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from lorakit import api, host
from lorakit.errors import LorakitError, near
from lorakit.formats import lineage
from lorakit.formats.files import writing
from lorakit.formats.folder import Folder
from lorakit.formats.receipt import modules_table, versions
from lorakit.hooks.base import build
from lorakit.inits import INITS
from lorakit.proof import verify
from lorakit.spec import Spec
from lorakit.training import data as d
from lorakit.training.base import bare, reread
from lorakit.training.bridge import AdapterTrainer
from lorakit.training.config import Run
from lorakit.training.measure import evaluate, samples
from lorakit.training.preference import dpo
from lorakit.training.prepare import Prepared, describe, prepare
from lorakit.training.report import write_report

Say = Callable[[str], None]


def build_model(p: Prepared, say: Say = print) -> nn.Module:
    """The base with the run's adapter on it, continuing from a saved one where the run says so."""
    run = p.run
    model = bare(p)
    spec = run.spec()
    if run.from_adapter is None:
        return api.adapt(model, spec, data=_looked_at(p, spec))
    before = Folder(run.from_adapter.path)
    p.lineage = lineage.entry(before, run.from_adapter.stage)
    frozen = lineage.apply(model, p.lineage)
    api.untie(model)
    if run.from_adapter.stage == "continue":
        say(f"continuing {before.path}: its method and targets hold, the run's adapter settings do not")
        api.load(model, before.path, trainable=True)
    else:
        api.adapt(model, spec, data=_looked_at(p, spec))
    return api.activate(model, *frozen, "default", chain=bool(frozen))


def _looked_at(p: Prepared, spec: Spec) -> list[dict[str, torch.Tensor]] | None:
    """Batches of training rows, drawn by the seed, for a start that looks at data."""
    if not (spec.init and INITS[spec.init].collect):
        return None
    size, rows = p.run.train.batch_size, p.train.rows
    rows = random.Random(p.run.train.seed).sample(rows, min(len(rows), size * spec.init_options.get("batches", 8)))
    rows = [{k: v for k, v in row.items() if k != "task"} for row in rows]
    collate = d.Collator(p.tokenizer.pad_token_id)
    return [collate(rows[k : k + size]) for k in range(0, len(rows), size)]


def arguments(run: Run, rows: int, held_out: bool = False) -> TrainingArguments:
    """transformers' arguments for a run over so many rows."""
    t = run.train
    steps = t.max_steps if t.max_steps > 0 else max(1, int(t.epochs * -(-rows // (t.batch_size * t.gradient_accumulation_steps))))
    cuda = torch.cuda.is_available()
    try:
        return TrainingArguments(
            output_dir=run.output, num_train_epochs=t.epochs, max_steps=t.max_steps, learning_rate=t.learning_rate,
            per_device_train_batch_size=t.batch_size, per_device_eval_batch_size=t.eval_batch_size,
            gradient_accumulation_steps=t.gradient_accumulation_steps, lr_scheduler_type=t.lr_scheduler_type,
            warmup_steps=int(t.warmup_ratio * steps), weight_decay=t.weight_decay, max_grad_norm=t.max_grad_norm, optim=t.optim, seed=t.seed,
            logging_steps=min(t.logging_steps, max(1, steps // 4)), save_strategy="steps", save_steps=t.save_steps or max(1, -(-steps // 2)),
            save_total_limit=t.save_total_limit, gradient_checkpointing=t.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if t.gradient_checkpointing else None, bf16=t.bf16, report_to=t.report_to,
            eval_strategy="steps" if held_out else "no", eval_steps=t.eval_steps or max(1, -(-steps // 4)),
            remove_unused_columns=False, use_cpu=not cuda, dataloader_pin_memory=cuda, disable_tqdm=not sys.stderr.isatty())
    except (ValueError, TypeError) as e:
        raise LorakitError(f"train: {str(e).splitlines()[0]}") from e


def _optimizer(run: Run, say: Say) -> None:
    """Refuses what transformers does not know, or cannot make here, before anything is loaded."""
    for key, known in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        name, names = getattr(run.train, key), [k.value for k in known]
        if name not in names:
            raise LorakitError(f"train.{key}: transformers knows no `{name}`{near(name, names)}")
    name = run.train.optim
    if (name.startswith("paged_") or name.endswith("_8bit")) and not name.startswith("adamw_torch") and not find_spec("bitsandbytes"):
        raise LorakitError(f"train.optim: {name} is bitsandbytes' own, which is not installed; mend: pip install bitsandbytes, or optim: adamw_torch")
    if name.startswith("paged_") and not torch.cuda.is_available():
        say(f"train.optim: {name}: there is no GPU, so there is nothing to page; it runs unpaged")


class Measured:
    """Evaluates by the token, so that packing and batch sizes do not change what is measured."""

    measure: Callable[[], dict[str, float]]
    measured: tuple[int, dict[str, float]] = (-1, {})

    def evaluate(self, *args: Any, **kw: Any) -> dict[str, float]:
        step = self.state.global_step
        if self.measured[0] != step:  # the end of training may ask twice
            self.measured = step, self.measure()
            self.log({k if k.startswith("eval_") else f"eval_{k}": v for k, v in self.measured[1].items()})
        return {k if k.startswith("eval_") else f"eval_{k}": v for k, v in self.measured[1].items()}


class _RunTrainer(Measured, AdapterTrainer):
    """The trainer of a run."""


class Lines(TrainerCallback):
    """Progress as at most some twenty plain lines; a terminal has transformers' own bar instead."""

    def __init__(self, say: Say):
        self.say, self.next, self.start = say, 0.0, time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kw):
        share = state.global_step / max(state.max_steps, 1)
        held = {k.removeprefix("eval_"): v for k, v in (logs or {}).items() if k.startswith("eval_")}
        if sys.stderr.isatty() or "train_runtime" in (logs or {}) or (not held and share < self.next):
            return
        self.next = share + 0.05
        what = f"held out: {_metrics(held)}" if held else f"loss {float(logs['loss']):.4g}" if "loss" in logs else ""
        self.say(f"step {state.global_step}/{state.max_steps}  {time.perf_counter() - self.start:.0f} s  {what}")


def train(run: Run, *, resume: bool = False, say: Say = print, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Runs it all and returns what `run.json` holds. LorakitError, with nothing lost, when something is wrong."""
    out = Path(run.output)
    if (out / "run.json").exists() and not resume:
        raise LorakitError(f"{out} already holds a finished run; mend: another `output`, or remove that folder")
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    hooks = [build(h) for h in run.hooks]
    _optimizer(run, say)
    p = prepare(run)
    say(describe(p))
    model = build_model(p, say)
    if torch.cuda.is_available():
        model.to("cuda")
        torch.cuda.reset_peak_memory_stats()
    if run.data.packing and not d.packs_apart(model):
        raise LorakitError(f"packing: {type(model).__name__} lets packed rows attend to each other; mend: packing: false")
    if run.data.packing:
        model.config.use_cache = False  # transformers keeps packed pieces apart only without a cache
    if api.repacked(model):
        say(f"the start made the quantised base anew: saved at {api.save_base(model, out / 'base', p.tokenizer)}, which the adapter belongs to")
    with writing(out) as w:
        w.text("config.yaml", yaml.safe_dump(run.model_dump(), sort_keys=False, allow_unicode=True))
    before, shown = evaluate(model, p), samples(model, p)
    say("before: " + _metrics(before))
    trainer = _trainer(p, model, hooks)
    trainer.measure = partial(evaluate, model, p)
    trainer.remove_callback(PrinterCallback)
    for callback in (Lines(say), *callbacks):
        trainer.add_callback(callback)
    checkpoint = resume and _last(out)
    if resume and not checkpoint:
        say(f"{out} holds no whole checkpoint yet: starting from the beginning")
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    trainer.evaluate()
    after, shown_after = trainer.measured[1], samples(model, p)
    say("after:  " + _metrics(after))
    for line in (f"{h.name}: {h.summary()}" for h in hooks if h.summary()):
        say(line)
    adapter = api.save(model, out / "adapter", "default", lineage=p.lineage)
    record = _record(p, model, trainer, before, after, shown, shown_after, seconds, adapter)
    del trainer, model
    gc.collect()
    record["verify"] = proof(run, adapter)
    record["adapter"]["bytes"] = sum(f.stat().st_size for f in adapter.iterdir() if f.suffix == ".safetensors")
    with writing(out) as w:
        w.json("run.json", record)
    write_report(record, out)
    return record


def proof(run: Run, adapter: Path) -> dict[str, Any]:
    """Verifies the saved adapter on a base read from disk anew."""
    return verify(adapter, reread(run, Folder(adapter))).to_dict()


def _trainer(p: Prepared, model: nn.Module, hooks: list) -> Any:
    rows = d.pack(p.train.rows, p.run.data.max_length or max(len(r["input_ids"]) for r in p.train.rows)) if p.run.data.packing else p.train.rows
    args = arguments(p.run, len(rows), p.heldout is not None)
    if p.shape == "preference":
        return dpo(Measured, p, model, args, hooks)
    return _RunTrainer(model=model, args=args, train_dataset=_Rows(rows), eval_dataset=_Rows(rows[:1]) if p.heldout else None,
                       data_collator=d.Collator(p.tokenizer.pad_token_id), hooks=hooks, lineage=p.lineage)


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, n):
        return self.rows[n]


def _last(out: Path) -> str | bool:
    found = sorted(out.glob("checkpoint-*"), key=lambda f: int(f.name.rsplit("-", 1)[1]))
    whole = [f for f in found if (f / "trainer_state.json").is_file()]  # written last: without it the save was cut off
    return str(whole[-1]) if whole else False


def _metrics(m: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in m.items()) or "no held-out data"


def peak_memory() -> int:
    """Bytes: the GPU's peak where there is one, else the process's peak resident size."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _record(p, model, trainer, before, after, shown, shown_after, seconds, adapter) -> dict[str, Any]:
    run, steps = p.run, trainer.state.global_step
    part, whole = api.trainable(model)
    spec = host.state_of(model).specs["default"]
    per_epoch = sum(len(r["input_ids"]) for r in p.train.rows)
    seen = per_epoch * (trainer.state.epoch or 0.0)
    rows = modules_table(model, "default")
    size = f"{spec.recipe or spec.method.name} r {spec.method.core.r}" if hasattr(spec.method.core, "r") else spec.recipe or spec.method.name
    return {
        "title": f"{size} on {Path(run.base.path).name}", "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "base": {"name": run.base.path, "parameters": whole - sum(r["parameters"] for r in rows.values())},
        "adapter": {"method": spec.recipe or spec.method.name, "summary": f"{size}, {len(rows)} modules", "path": str(adapter), "trainable": part},
        "data": {"train": run.data.train, "shape": p.shape, "rows": len(p.rows), "tokens": p.train.tokens, "trained_tokens": p.train.trained_tokens,
                 "eval_rows": len(p.held), "preview": d.preview(p.train.rows, p.tokenizer, 3)},
        "history": trainer.state.log_history, "metrics": {"before": before, "after": after},
        "samples": [{**a, "after": b["text"], "before": a["text"]} for a, b in zip(shown, shown_after, strict=True)],
        "cost": {"train_seconds": seconds, "tokens_per_second": seen / seconds if seconds else None, "peak_memory_bytes": peak_memory(), "steps": steps,
                 "threads": torch.get_num_threads(), "device": "cuda" if torch.cuda.is_available() else "cpu"},
        "modules": [{"name": n, "rank": r.get("rank"), "delta_norm": r["delta_norm"], "share": r["delta_norm"] / max(r["base_norm"], 1e-30)}
                    for n, r in rows.items()],
        "config": json.loads(run.model_dump_json()), "versions": versions(), "lineage": p.lineage, "labels": p.labels}


