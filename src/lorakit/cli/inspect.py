"""lorakit inspect: what is in an adapter.

    lorakit inspect runs/a/adapter
    lorakit inspect runs/a/adapter --json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lorakit.cli.app import app, out, quiet


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="adapter folder")],
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Per module: method, rank, size of the update, its share of the base weight. Needs no base model."""
    quiet()
    from lorakit.formats.folder import Folder

    folder = Folder(adapter)
    told = (folder.receipt or {}).get("modules", {})
    rows = []
    for path, method in folder.methods.items():
        count = sum(t.numel() for k, t in folder.tensors.items() if f".{path}." in k)
        r = told.get(path, {})
        share = r["delta_norm"] / r["base_norm"] if r.get("base_norm") else None
        rows.append({"module": path, "method": method.name, "rank": getattr(method.core, "r", None), "parameters": count,
                     "delta_norm": r.get("delta_norm"), "share": share})
    head = {"adapter": str(adapter), "base": folder.config.get("base_model_name_or_path"), "peft_type": folder.config.get("peft_type"),
            "parameters": sum(t.numel() for t in folder.tensors.values()), "modules": len(rows),
            "saved": (folder.receipt or {}).get("created"), "lineage": (folder.receipt or {}).get("lineage", []),
            "start": (folder.receipt or {}).get("start"), "base_digest": (folder.receipt or {}).get("base", {}).get("digest")}
    if as_json:
        out.print(json.dumps(head | {"table": rows}, indent=2), markup=False)
        return
    steps = [f"{s['stage']} {s['adapter']}" + (f" × {s['weight']:g}" if "weight" in s else "") for s in head["lineage"]]
    out.print("\n".join(f"{k}: {v}" for k, v in (head | {"lineage": ", ".join(steps)}).items() if v not in (None, "")), markup=False)
    table = Table(box=None)
    for name, where in (("module", "left"), ("method", "left"), ("rank", "right"), ("parameters", "right"), ("|dW|", "right"), ("|dW|/|W|", "right")):
        table.add_column(name, justify=where, no_wrap=name != "module")
    for r in rows:
        table.add_row(r["module"], r["method"], str(r["rank"] or "-"), f"{r['parameters']:,}", "-" if r["delta_norm"] is None else f"{r['delta_norm']:.4g}",
                      "-" if r["share"] is None else f"{r['share']:.2%}")
    out.print(table)
    if not folder.receipt:
        out.print("no receipt.json (another library wrote this), so the sizes of the updates are not known without the base", markup=False)
