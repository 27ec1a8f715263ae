"""lorakit convert: a saved adapter in another file format.

    lorakit convert runs/a/adapter -o a.safetensors --to kohya
    lorakit convert runs/a/adapter -o a.gguf --to gguf
    lorakit convert a.gguf -o a --to peft --base ./base
    lorakit convert runs/a/adapter -o a.compeft --to compeft --density 0.2   # a sign for one number in five: about 1 bit a number
    lorakit convert a.compeft -o b --to peft

The source's format is found by what it holds. Formats: peft (a PEFT folder), kohya (kohya / A1111 / LyCORIS, one .safetensors), gguf
(llama.cpp), mlx (mlx-lm, a folder), vllm (a PEFT folder that vLLM takes), compeft (ComPEFT: signs alone, one .compeft). What had to be
folded or padded, and how far a format rounds, is said; what the format cannot hold is refused. The result is read again and compared
with what was meant, with logits where a base is at hand, before it appears under its name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.app import app, out, quiet


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="adapter folder or file, in any known format")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder or file to write; not there yet")],
    to: Annotated[str, typer.Option(help="peft, kohya, gguf, mlx, vllm or compeft")],
    base: Annotated[str | None, typer.Option(help="base model; to read kohya and gguf it is needed")] = None,
    rank: Annotated[int | None, typer.Option(help="make every target a plain LoRA of at most this rank, the nearest there is")] = None,
    prefix: Annotated[str | None, typer.Option(help="kohya: lora_unet, lora_te, lora_te1, …")] = None,
    density: Annotated[float | None, typer.Option(help="compeft: share of the numbers that stay; default 0.2")] = None,
    scale: Annotated[float | None, typer.Option(help="compeft: what stays is this times the standard deviation; default 1")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the report as JSON")] = False,
) -> None:
    """Write an adapter in another file format, say what was folded, read it back and compare."""
    quiet()
    from lorakit import api

    options = {k: v for k, v in (("prefix", prefix), ("density", density), ("scale", scale)) if v is not None}
    done = api.convert(source, output, to, base, rank=rank, **options)
    out.print(json.dumps(done.to_dict(), indent=2) if as_json else str(done), markup=False)
