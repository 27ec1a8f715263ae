"""lorakit verify: proof that an adapter is in effect.

    lorakit verify runs/a/adapter
    lorakit verify runs/a/adapter --base ./base --merged ./merged

Points: the files are those the receipt was written for; the base has the fingerprint of the one trained on (else the
tensors that differ are named); every tensor found its place; no update is zero, and each has the size it had; logits on
fixed inputs are those of the day of saving. With `--merged`: every merged weight is base + adapter, and so are the logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.app import app, out, quiet


@app.command()
def verify(
    adapter: Annotated[Path, typer.Argument(help="adapter folder")],
    base: Annotated[str | None, typer.Option(help="base model; default: the one the adapter names")] = None,
    merged: Annotated[Path | None, typer.Option(help="a merged model to check against base + adapter")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the report as JSON")] = False,
) -> None:
    """Recompute everything the adapter's receipt says, from what is on disk. Exits with 1 if a point fails."""
    quiet()
    from lorakit.proof import verify as check

    report = check(adapter, base, merged)
    out.print(json.dumps(report.to_dict(), indent=2) if as_json else str(report), markup=False)
    if not report.ok:
        raise typer.Exit(1)
