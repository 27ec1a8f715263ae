"""lorakit train: data to verified adapter.

    lorakit config example > run.yaml            # every setting, commented
    lorakit train run.yaml --dry-run             # shows the data decoded, with what is trained marked, and the sizes
    lorakit train run.yaml --set adapter.method=dora --set train.learning_rate=1e-3
    lorakit train run.yaml --resume              # after a crash: goes on from the last checkpoint, to the bit
    lorakit train run.yaml --from-adapter runs/a/adapter --stage freeze

Data may be JSONL, JSON, CSV, Parquet or text, a file, a folder or a hub name; `messages`, ShareGPT, Alpaca, prompt and
completion, text, text with a label, and preference pairs (chosen, rejected: DPO through TRL) are told apart by their columns. The loss
is on answers only unless you say otherwise.

The run folder holds `config.yaml` (resolved, runs again), `checkpoint-*`, `adapter/` (a PEFT folder with a receipt),
`run.json`, `loss.png` and `report.html`. The saved adapter is verified on a base that is read from disk anew.

Stages of `--from-adapter`: `continue` trains the same adapter on; `freeze` trains a new one around the old, which stays;
`merge` trains a new one on the merged base. The receipt keeps the lineage, and `verify`, `generate` and `chat` follow it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from lorakit.cli.app import app, out, quiet
from lorakit.errors import LorakitError


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file (`lorakit config example` prints one)")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a setting, e.g. --set train.learning_rate=1e-4")] = None,
    from_adapter: Annotated[str | None, typer.Option(help="start from this saved adapter")] = None,
    stage: Annotated[str, typer.Option(help="continue it, freeze it under a new one, or merge it first")] = "continue",
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint in the run folder, to the bit")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, show the data and the sizes, train nothing")] = False,
) -> None:
    """Fine-tune a base model with an adapter; measure before and after; save, read back and verify."""
    quiet()
    from lorakit import api
    from lorakit.training import config as c
    from lorakit.training import report
    from lorakit.training import run as r

    words = list(sets or [])
    if from_adapter:
        words += [f"from_adapter.path={from_adapter}", f"from_adapter.stage={stage}"]
    if config is None and not words:
        raise LorakitError("train needs a YAML file or --set data.train=FILE; mend: lorakit config example > run.yaml")
    run = c.read(config, words)
    if dry_run:
        p = r.prepare(run)
        out.print(yaml.safe_dump(run.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True).strip(), markup=False)
        out.print(r.describe(p), markup=False)
        model = r.build_model(p, lambda s: out.print(s, markup=False))
        part, whole = api.trainable(model)
        out.print(f"{part:,} of {whole:,} parameters train ({part / whole:.2%}); nothing was trained or written")
        return
    record = r.train(run, resume=resume, say=lambda s: out.print(s, markup=False))
    for s in record["samples"]:
        told = [("prompt", s["prompt"]), ("before", s["before"]), ("after", s["after"]), *([("expected", s["expected"])] if s["expected"] else [])]
        out.print("\n".join(f"{what + ':':<10}{' '.join(text.split())}" for what, text in told) + "\n", markup=False)
    out.print(report.summary(record))
    out.print(f"report: {Path(run.output) / 'report.html'}\nloss curve: {Path(run.output) / 'loss.png'}", markup=False)
    if not record["verify"]["ok"]:
        raise LorakitError("the saved adapter did not verify: " + "; ".join(p["detail"] for p in record["verify"]["points"] if p["ok"] is False))
