"""lorakit methods: everything the library knows by name.

    lorakit methods
    lorakit methods show dora
    lorakit methods show 2402.09353
    lorakit methods --kind init --json
"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from lorakit.cli.app import app, out


@app.command()
def methods(
    verb: Annotated[str | None, typer.Argument(help="`show`, or nothing for the list", show_default=False)] = None,
    name: Annotated[str | None, typer.Argument(help="a name from a paper, an alias, or an arXiv id", show_default=False)] = None,
    kind: Annotated[str | None, typer.Option(help="recipe, method, wrapper, init, hook or store")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="a list of objects")] = False,
) -> None:
    """List every recipe, method, wrapper, init, hook and store; `methods show NAME` tells all about one."""
    from lorakit import catalog
    from lorakit.errors import LorakitError, near

    if verb == "show" and name is None:
        raise LorakitError("methods show: which? mend: lorakit methods show lora")
    if verb is not None:
        found = catalog.show(name if verb == "show" else verb)
    else:
        found = catalog.entries()
    if kind is not None:
        kinds = sorted({e["kind"] for e in found})
        if kind not in kinds:
            raise LorakitError(f"methods: no kind `{kind}`{near(kind, kinds)}")
        found = [e for e in found if e["kind"] == kind]
    if as_json:
        out.print(json.dumps(found, indent=2, ensure_ascii=False), markup=False)
    elif verb is None:
        table = Table(box=None)
        for column in ("kind", "name", "formula", "paper", "also called"):
            table.add_column(column, no_wrap=column in ("kind", "name", "paper"))
        for e in found:
            table.add_row(e["kind"], e["name"], e["formula"], e["paper"], ", ".join(e["aliases"]))
        out.print(table)
    else:
        for e in found:
            _one(e)


def _one(e: dict) -> None:
    paper = f"  arXiv {e['paper']}" if e["paper"] else ""
    out.print(f"{e['kind']} {e['name']}: {e['title']}{paper}\n    {e['formula']}", markup=False)
    if e["aliases"]:
        out.print(f"also called: {', '.join(e['aliases'])}", markup=False)
    if e.get("doc"):
        out.print(e["doc"], markup=False)
    for f in e.get("fields", []):
        out.print(f"  {f['name']}: {f['type']} = {f['default']}  {f['about']}", markup=False)
    for leaf in e.get("leaves", []):
        state = ("shared, " if leaf["shared"] else "") + ("trains" if leaf["trains"] else "frozen")
        out.print(f"  leaf {leaf['name']} ({leaf['axes'].replace(' ', ', ')}): {state}, key {leaf['key']}", markup=False)
    if "sites" in e:
        out.print(f"  merges: {e['mergeable']}; targets: {', '.join(e['sites'])}; trains on one: {e['parameters'] or 'nothing'}", markup=False)
    if e["kind"] == "recipe":
        more = [f"init {e['init']}"] * bool(e["init"]) + [f"frozen {', '.join(e['freeze'])}"] * bool(e["freeze"])
        out.print(f"  = {', '.join([json.dumps(e['method']), *more])}", markup=False)
    out.print()
