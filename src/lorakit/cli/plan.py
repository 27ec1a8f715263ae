"""lorakit plan: the memory of a training step, before any run, from the model's configuration alone.

    lorakit plan embedded --batch 8 --length 256
    lorakit plan meta-llama/Llama-3.1-8B --dtype bfloat16 --methods lora,dora,lora-fa,none --memory 24GB --checkpointing
    lorakit plan runs/base --set r=32 --set target_modules=attention --json

`none` is the base with everything training. `saved` is what the forward pass keeps for the backward pass; `peak` is the most that is
alive at once, weights, gradients and the optimiser's state included. Both count tensors: beside them stand Python and its libraries, and
what the allocator keeps for later, so a process on a CPU shows more.
"""

from __future__ import annotations

import json
import re
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
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="with gradient checkpointing")] = False,
    memory: Annotated[str | None, typer.Option(help="what there is, e.g. 16GB: says what fits")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="an option of the adapter, e.g. --set r=16")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="bytes, as JSON")] = False,
) -> None:
    """Bytes per method: weights, gradients, optimiser, what is kept for the backward pass, the peak."""
    quiet()
    from lorakit.planning import memory as cost

    limit = _bytes(memory) if memory else None
    options = dict(_pair(word) for word in sets or [])
    rows = {}
    for name in [m.strip() for m in methods.split(",") if m.strip()]:
        mine = options if name not in ("none", "full") else {k: v for k, v in options.items() if k not in ("r", "lora_alpha", "lora_dropout")}
        rows[name] = cost(base, None if name == "none" else name, task=task, batch=batch, length=length, dtype=dtype, optimizer=optimizer,
                          gradient_checkpointing=checkpointing, **({} if name == "none" else mine)).to_dict()
        if limit:
            rows[name]["fits"] = rows[name]["peak"] <= limit
    if as_json:
        out.print(json.dumps(rows, indent=2), markup=False)
        return
    table = Table(box=None)
    for column in ("method", "trains", *COLUMNS, *(["fits"] if limit else [])):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, f"{row['trainable']:,}", *(_human(row[c]) for c in COLUMNS), *(["yes" if row["fits"] else "no"] if limit else []))
    out.width = max(out.width, 110)  # a cut figure says nothing
    out.print(table)


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
