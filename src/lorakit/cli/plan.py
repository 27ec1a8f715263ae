"""lorakit plan: the memory and time of a training step, before any run, and which method fits a goal.

    lorakit plan embedded --batch 8 --length 256 --time --picture plan.png
    lorakit plan embedded --goal memory --memory 200MB
    lorakit plan meta-llama/Llama-3.1-8B --dtype bfloat16 --methods lora,dora,lora-fa,none --memory 24GB --checkpointing
    lorakit plan meta-llama/Llama-3.1-8B --dtype bfloat16 --quantize nf4 --methods lora,dora
    lorakit plan runs/base --set r=32 --set target_modules=attention --json

`none` is the base with everything training. `saved` is what the forward pass keeps for the backward pass; `peak` is the most that is
alive at once, weights, gradients and the optimiser's state included. Both count tensors: beside them stand Python and its libraries, and
what the allocator keeps for later, so a process on a CPU shows more. Memory comes from the model's configuration alone; with --time
models of one and two layers are timed here for a second each, and the rest is extrapolated. With --goal the answer is one
configuration, with its reason and what was ruled out; its preferences are rules of thumb, its memory is exact.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.table import Table

from lorakit.cli.app import app, out, quiet
from lorakit.errors import LorakitError

COLUMNS = ("base", "adapter", "gradients", "optimizer", "saved", "logits", "peak")
UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


@app.command()
def plan(
    base: Annotated[str, typer.Argument(help="model folder, hub name, or `embedded`")],
    methods: Annotated[str, typer.Option(help="names from `lorakit methods`, and `none`, with commas between")] = "lora,rslora,dora,lora-fa,full,none",
    batch: Annotated[int, typer.Option(help="sequences in a step")] = 8,
    length: Annotated[int, typer.Option(help="tokens in a sequence")] = 512,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; by default the checkpoint's")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd")] = "adamw",
    task: Annotated[str, typer.Option(help="causal-lm or sequence-classification")] = "causal-lm",
    quantize: Annotated[str | None, typer.Option(help="how the linear layers are kept: nf4, nf3, nf2, or int8, int7, … int2")] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="with gradient checkpointing")] = False,
    memory: Annotated[str | None, typer.Option(help="what there is, e.g. 16GB: says what fits")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="an option of the adapter, e.g. --set r=16")] = None,
    timed: Annotated[bool, typer.Option("--time", help="seconds a step and tokens a second, from a short calibration on this machine")] = False,
    goal: Annotated[str | None, typer.Option(help="memory, quality, speed or many-tasks: recommends one configuration")] = None,
    picture: Annotated[Path | None, typer.Option(help="a picture of the table, .png or .svg")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="bytes, as JSON")] = False,
) -> None:
    """Bytes per method: weights, gradients, optimiser, what is kept for the backward pass, the peak; time; a recommendation."""
    quiet()
    from lorakit.planning import advise, draw, seconds
    from lorakit.planning import memory as cost

    limit = _bytes(memory) if memory else None
    if goal:
        told = advise(base, goal, limit, task=task, batch=batch, length=length, dtype=dtype, optimizer=optimizer, gradient_checkpointing=checkpointing,
                      quantize=quantize)
        _advice(told, base, as_json)
        return
    options = dict(_pair(word) for word in sets or [])
    rows, plans = {}, {}
    for name in [m.strip() for m in methods.split(",") if m.strip()]:
        if quantize and name in ("none", "full"):  # they train the weights themselves
            continue
        mine = options if name not in ("none", "full") else {k: v for k, v in options.items() if k not in ("r", "lora_alpha", "lora_dropout")}
        one = {"adapter": None if name == "none" else name, "task": task, "batch": batch, "length": length, "dtype": dtype,
               "gradient_checkpointing": checkpointing, "quantize": quantize, **({} if name == "none" else mine)}
        plans[name] = cost(base, optimizer=optimizer, **one)
        rows[name] = plans[name].to_dict()
        if timed:
            t = seconds(base, **one)
            rows[name] |= {"seconds_per_step": t.step, "tokens_per_second": t.tokens_per_second}
        if limit:
            rows[name]["fits"] = rows[name]["peak"] <= limit
    if picture:
        draw(plans, picture, limit)
    if as_json:
        out.print(json.dumps(rows, indent=2), markup=False)
        return
    table = Table(box=None)
    for column in ("method", "trains", *COLUMNS, *(["s/step", "tokens/s"] if timed else []), *(["fits"] if limit else [])):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, f"{row['trainable']:,}", *(_human(row[c]) for c in COLUMNS), *(
            [f"{row['seconds_per_step']:.3g}", f"{row['tokens_per_second']:,.0f}"] if timed else []), *(["yes" if row["fits"] else "no"] if limit else []))
    out.width = max(out.width, 116 + 20 * timed + 6 * bool(limit))  # a cut figure says nothing
    out.print(table)


def _advice(told, base: str, as_json: bool) -> None:
    if as_json:
        out.print(json.dumps(asdict(told) | {"config": told.config(base)}, indent=2), markup=False)
        return
    out.print(f"Goal: {told.goal}. Rank, a rule of thumb: {told.rank_rule}.", markup=False)
    if told.method is None:
        out.print(told.why, markup=False)
    else:
        name = told.method + (f" on {told.quantize}" if told.quantize else "")
        out.print(f"Take {name}: {told.why}. Peak {_human(told.memory.peak)}, {told.memory.trainable:,} numbers train.", markup=False)
        out.print(yaml.safe_dump(told.config(base), sort_keys=False).rstrip(), markup=False)
    for name, why in told.ruled_out:
        out.print(f"Not {name}: {why}", markup=False)


def _pair(word: str) -> tuple[str, object]:
    key, sign, value = word.partition("=")
    if not sign:
        raise LorakitError(f"--set {word}: write KEY=VALUE, e.g. --set r=16")
    return key, yaml.safe_load(value)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmg]i?)?b?\s*", text.lower())
    if not found:
        raise LorakitError(f"--memory {text}: not a size; write 16GB, 800MB or 24GiB")
    return int(float(found.group(1)) * UNITS[found.group(2) or ""])


def _human(n: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:,.1f} {unit}"
    return f"{n} B"
