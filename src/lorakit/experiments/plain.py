"""Configurations that are not lorakit's: PEFT's own layers, every weight of the model, its head alone, nothing. Data, loss, optimiser, loop are the same."""

from __future__ import annotations

import dataclasses
import datetime
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from lorakit.errors import LorakitError, near
from lorakit.experiments import measure as extra
from lorakit.formats.files import writing
from lorakit.formats.receipt import versions
from lorakit.methods.lora import LoRA
from lorakit.targets import classifier
from lorakit.training import base
from lorakit.training import data as d
from lorakit.training import run as r
from lorakit.training.config import Run
from lorakit.training.measure import evaluate
from lorakit.training.prepare import Prepared, describe, prepare
from lorakit.training.report import write_report

SWITCHES = {"dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "pissa": {"init_lora_weights": "pissa"}, "olora": {"init_lora_weights": "olora"}}
WORDS = {"alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules", "rank": "r"}


def bare(p: Prepared) -> nn.Module:
    """The base as a run loads it, on the GPU where there is one."""
    model = base.bare(p)
    return model.to("cuda") if torch.cuda.is_available() else model


def peft_config(options: dict[str, Any], task: str, steps: int = -1) -> Any:
    """PEFT's configuration from `method` and the options of its class. What is not given and both sides have is as in lorakit."""
    try:
        import peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as kinds
    except ImportError as e:
        raise LorakitError("backend: peft needs the package `peft`, which is not installed; mend: pip install peft") from e
    given = {WORDS.get(k, k): v for k, v in options.items() if k != "method"}
    name = options["method"]
    known = {str(k.value).lower().replace("_", "-"): v for k, v in kinds.items()}
    if name not in known and name not in SWITCHES:
        raise LorakitError(f"backend: peft: unknown method `{name}`{near(name, [*known, *SWITCHES])}")
    cls = known.get(name, peft.LoraConfig)
    fields = {f.name for f in dataclasses.fields(cls)}
    for k in given:
        if k not in fields:
            raise LorakitError(f"backend: peft: {cls.__name__} has no option `{k}`{near(k, fields)}")
    ours = {"r": LoRA().r, "lora_alpha": LoRA().alpha, "target_modules": "all-linear"}
    same = ours if cls is peft.LoraConfig else {"target_modules": "all-linear"}
    same |= {"total_step": steps} if steps > 0 else {}
    try:
        config = cls(**{k: v for k, v in same.items() if k in fields} | SWITCHES.get(name, {}) | given
                     | {"task_type": {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}[task]})
    except (ValueError, TypeError) as e:
        raise LorakitError(f"backend: peft: {e}") from e
    if config.is_prompt_learning:
        raise LorakitError(f"backend: peft: {name} puts tokens of its own before the input, which the measures here do not know; mend: leave it out")
    return config


def build(kind: str, options: dict[str, Any] | None, p: Prepared) -> nn.Module:
    """The base with what trains switched on."""
    model = bare(p)
    if kind == "peft":
        config = peft_config(options, p.task, p.run.train.max_steps)
        import peft

        torch.manual_seed(p.run.train.seed)
        try:
            return peft.get_peft_model(model, config)
        except (ValueError, TypeError, KeyError, NotImplementedError) as e:
            raise LorakitError(f"backend: peft: {e}") from e
    if kind == "full" and p.run.base.quantize:
        raise LorakitError("full fine-tuning trains the weights, and this base keeps them quantised; mend: leave base.quantize out")
    heads = classifier(model)
    if kind == "probe" and not heads:
        raise LorakitError(f"linear-probe: {type(model).__name__} has no classifier's head; mend: data of text and label")
    for name, q in model.named_parameters():
        q.requires_grad_(kind == "full" or name.split(".")[0] in heads)
    return model


class _Trainer(r.Measured, Trainer):
    """transformers' trainer with a run's evaluation."""


class Allocate(TrainerCallback):
    """What PEFT's AdaLoRA wants called after each step, while gradients are there."""

    def on_optimizer_step(self, args, state, control, model=None, **kw):
        if hasattr(getattr(model, "base_model", None), "update_and_allocate"):
            model.base_model.update_and_allocate(state.global_step)


def _save(kind: str, model: nn.Module, out: Path) -> int:
    """Saves what trained; its bytes."""
    out.mkdir(parents=True, exist_ok=True)
    if kind in ("peft", "full"):
        model.save_pretrained(out)
    else:
        save_file({n: q.detach().contiguous() for n, q in model.named_parameters() if q.requires_grad}, out / "head.safetensors")
    return sum(f.stat().st_size for f in out.iterdir() if f.suffix in (".safetensors", ".bin"))


def train(kind: str, options: dict[str, Any] | None, run: Run, watch: Any, say: r.Say = print) -> dict[str, Any]:
    """One such run in its folder; what `run.json` holds, and the merge loss."""
    out = Path(run.output)
    p = prepare(run)
    if p.shape == "preference":
        raise LorakitError("pairs of answers are trained with lorakit's adapters alone; mend: leave this cell out")
    say(describe(p))
    model = build(kind, options, p)
    before = evaluate(model, p)
    say("before: " + r._metrics(before))
    if run.data.packing:
        if not d.packs_apart(model):
            raise LorakitError(f"packing: {type(model).__name__} lets packed rows attend to each other; mend: packing: false")
        model.config.use_cache = False
    length = run.data.max_length or max(len(row["input_ids"]) for row in p.train.rows)
    rows = d.pack(p.train.rows, length) if run.data.packing else p.train.rows
    trainer = _Trainer(model=model, args=r.arguments(run, len(rows), True), train_dataset=r._Rows(rows), eval_dataset=r._Rows(rows[:1]),
                       data_collator=d.Collator(p.tokenizer.pad_token_id))
    trainer.measure = partial(evaluate, model, p)
    trainer.remove_callback(PrinterCallback)
    for callback in (r.Lines(say), Allocate(), watch):
        trainer.add_callback(callback)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.evaluate()
    after = trainer.measured[1]
    say("after:  " + r._metrics(after))
    size = _save(kind, model, out / "adapter")
    part, whole = (sum(q.numel() for q in model.parameters() if q.requires_grad or every) for every in (False, True))
    title = {"peft": f"{(options or {}).get('method')} by PEFT", "full": "every weight", "probe": "linear probe"}[kind]
    record = {"title": f"{title} on {Path(run.base.path).name}", "date": datetime.datetime.now().isoformat(timespec="seconds"),
              "base": {"name": run.base.path, "parameters": whole - part if kind == "peft" else whole},
              "adapter": {"method": title, "summary": title, "path": str(out / "adapter"), "trainable": part, "bytes": size},
              "data": {"train": run.data.train, "shape": p.shape, "rows": len(p.rows), "tokens": p.train.tokens, "eval_rows": len(p.held)},
              "history": trainer.state.log_history, "metrics": {"before": before, "after": after}, "samples": [], "modules": [],
              "cost": {"train_seconds": seconds, "peak_memory_bytes": watch.peak, "steps": trainer.state.global_step,
                       "threads": torch.get_num_threads(), "device": "cuda" if torch.cuda.is_available() else "cpu"},
              "config": run.model_dump(mode="json") | {"adapter": {"kind": kind, **(options or {})}}, "versions": versions(), "verify": {"ok": None}}
    with writing(out) as w:
        w.json("run.json", record)
    write_report(record, out)
    if kind == "peft":
        record["merge_loss"] = _merge_loss(model, p, say)
    return record


def _merge_loss(model: nn.Module, p: Prepared, say: r.Say) -> float | None:
    live = extra.logits(model, p)
    try:
        return extra.merge_loss(live, extra.logits(model.merge_and_unload(), p))
    except (NotImplementedError, AttributeError, ValueError, TypeError) as e:
        say(f"not merged: {e}")
        return None
