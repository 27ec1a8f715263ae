"""lorakit merge: base + adapter as a plain model.

    lorakit merge runs/a/adapter -o merged
    lorakit merge runs/a/adapter -o merged --dtype bfloat16
    lorakit merge runs/qlora/adapter -o merged --route requantize
    lorakit merge runs/a/adapter -o merged --streamed --base ./base    # one weight in memory at a time; verify it with --merged

The folder appears whole or not at all; it is read back from disk and verified before the verb ends. Where an adapted
embedding was tied to the head, the two part, and the configuration says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.app import app, out, quiet


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="adapter folder")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder of the merged model")],
    base: Annotated[str | None, typer.Option(help="base model; default: the one the adapter names")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    route: Annotated[str, typer.Option(help="what becomes of a quantised base: dequantized, requantize or exact")] = "dequantized",
    streamed: Annotated[bool, typer.Option("--streamed", help="weight by weight in a copy of the base's files; the model is not loaded")] = False,
    force: Annotated[bool, typer.Option("--force", help="requantize though rounding loses most of the adapter")] = False,
) -> None:
    """Write the adapter into the base's weights, save the model, read it back, and verify that it is base + adapter."""
    quiet()
    from lorakit import api
    from lorakit.cli.use import base_of, model_for
    from lorakit.errors import LorakitError
    from lorakit.models import load_tokenizer
    from lorakit.proof import verify as check

    if streamed:
        changed = api.merge_checkpoint(base_of(adapter, base), adapter, output)
        out.print(f"{len(changed)} weights changed; merged model: {output}; to compare both: lorakit verify {adapter} --merged {output}", markup=False)
        return
    model = model_for(adapter, base, dtype)
    api.load(model, adapter)
    name = base_of(adapter, base)
    try:
        tokenizer = load_tokenizer(name)
    except LorakitError:
        tokenizer = None
    api.save_merged(model, output, tokenizer, route, **({"force": True} if force else {}))
    report = check(adapter, name, output)
    out.print(str(report), markup=False)
    if not report.ok and not force:
        raise LorakitError(f"the merged model in {output} did not verify")
    out.print(f"merged model: {output}", markup=False)
