"""lorakit diff: what differs between two saved adapters.

    lorakit diff a b
    lorakit diff a b --base ./base        # for methods whose update depends on the weight (DoRA, OFT, …)

Fields of the configurations, targets, ranks, bases; and of every target that both have: the cosine between the updates, the ratio of
their norms, and how far they are apart, as a part of the first one's norm. Exits with 0 whatever it finds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.app import app, out, quiet


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="adapter folder")],
    b: Annotated[Path, typer.Argument(help="adapter folder")],
    base: Annotated[str | None, typer.Option(help="base model, where an update depends on it")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="all of it, every target, as JSON")] = False,
) -> None:
    """Say what differs between two saved adapters, target by target, without their base."""
    quiet()
    from lorakit import api

    found = api.diff(a, b, base)
    out.print(json.dumps(found.to_dict(), indent=2) if as_json else str(found), markup=False)
