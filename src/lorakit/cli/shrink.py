"""lorakit shrink: a saved adapter as a plain LoRA of a lower rank.

    lorakit shrink runs/a/adapter --rank 4 -o small
    lorakit shrink runs/oft/adapter --rank 16 -o as-lora --base ./base

The result is the best of its rank on every target (by singular values); what it leaves out is said, as a part of the update's
norm, and stands in the receipt. Another method than LoRA goes out as plain LoRA, too, where its update is one matrix. The
folder is verified before the verb ends.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.cli.app import app, out, quiet


@app.command()
def shrink(
    adapter: Annotated[Path, typer.Argument(help="adapter folder")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder of the smaller adapter")],
    rank: Annotated[int, typer.Option(help="highest rank of the result")],
    base: Annotated[str | None, typer.Option(help="base model; default: the one the adapter names")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="what was left out, by target, as JSON")] = False,
) -> None:
    """Lower the rank of a saved adapter, or turn another method into plain LoRA, and say what that leaves out."""
    quiet()
    from lorakit import api
    from lorakit.cli.use import base_of, model_for
    from lorakit.errors import LorakitError
    from lorakit.formats.folder import Folder
    from lorakit.proof import verify as check

    if rank < 1:
        raise LorakitError(f"--rank must be at least 1, not {rank}")
    name, was = base_of(adapter, base), Folder(adapter)
    model = model_for(adapter, base, "float32")
    api.load(model, adapter)
    api.save(model, output, form="lora", rank=rank, lineage=(was.receipt or {}).get("lineage", ()))
    made = Folder(output)
    said: dict[str, Any] = (made.receipt or {}).get("conversion_error") or {"overall": 0.0, "modules": {}}
    report = check(output, name)
    if not report.ok:
        out.print(str(report), markup=False)
        raise LorakitError(f"the adapter in {output} did not verify")
    if as_json:
        out.print(json.dumps(said, indent=2), markup=False)
        return
    for path, error in sorted(said["modules"].items(), key=lambda e: -e[1])[:5]:
        out.print(f"  {path}: {error:.1%} of the update left out", markup=False)
    before, after = (sum(t.numel() for t in f.tensors.values()) for f in (was, made))
    out.print(f"rank at most {rank}: {said['overall']:.2%} of the update's norm left out; {before:,} -> {after:,} numbers; verified", markup=False)
    out.print(f"smaller adapter: {output}", markup=False)
