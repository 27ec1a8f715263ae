"""lorakit compare: several configurations on one base and one task, several seeds each, with what differs and what ties.

    lorakit compare cells.yaml --dry-run     # the cells and seeds it would run
    lorakit compare cells.yaml               # again after an interruption: what is finished stays, the rest is run
    lorakit compare cells.yaml --again       # runs anew what was made with other settings

The file has the keys of `lorakit train` (base, data, train, eval), which hold for all cells, and:

    seeds: 3                          # or a list; of data order, dropout, the adapter's start, and the held-out part
    budget: {tokens: 200000}          # or steps, or seconds inside training steps (with lr_scheduler_type: constant)
    metric: eval_loss                 # or perplexity, accuracy, exact_match, preference_accuracy
    cells:
      - {name: base, base: true}      # the untouched base
      - {name: lora8, adapter: {method: lora, r: 8}}
      - {name: dora8, adapter: {method: dora, r: 8}, train: {learning_rate: 1e-3}}
      - {name: full, adapter: full}   # all targeted weights train
    grid: {adapter.method: [lora, rslora], adapter.r: [4, 16]}
    output: runs/comparison

Without `data.eval` each seed holds out another part of the data, and intervals are as wide as these parts differ; what is
compared by seed is not touched by it. Each cell with each seed is a run folder, made in a process of its own, so that peak
memory is its own (on a CPU with Python and its libraries in it) and a failure is a row with its error. Time is that of the
training steps alone. Intervals are Student's; differences are paired by seed and
corrected for all pairs (Holm); what is not distinguishable is called so. A token budget ends at the first step that reaches it.
The folder holds `comparison.md`, `comparison.csv` and `comparison.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.app import app, out, quiet
from lorakit.errors import LorakitError


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    again: Annotated[bool, typer.Option("--again", help="run anew what was made with other settings")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the cells and seeds, run nothing")] = False,
) -> None:
    """Compare configurations fairly: equal budget, several seeds, intervals, what differs and what ties. Exits with 1 if a cell fails."""
    quiet()
    from lorakit.experiments import compare as e
    from lorakit.experiments import config as settings
    from lorakit.experiments import table

    c = settings.read(config)
    if dry_run:
        todo = e.plan(c, again)
        for name in c.cells:
            mine = [(t, run) for t, _, run in todo if t.cell == name]
            seeds = ", ".join(str(t.seed) + ("" if run else " (finished)") for t, run in mine)
            trial = mine[0][0]
            what = "the untouched base" if trial.untouched else ", ".join(f"{k}: {v}" for k, v in trial.run.adapter.items())
            rate = "" if trial.untouched else f"; learning_rate: {trial.run.train.learning_rate:g}"
            out.print(f"{name}  seeds {seeds}  {what}{rate}", markup=False)
        budget = ", ".join(f"{v:g} {k}" for k, v in c.trials[0].budget.items()) or "none: `train` says how long"
        out.print(f"{sum(run for *_, run in todo)} runs; budget of each: {budget}; nothing was run or written", markup=False)
        return
    record = e.compare(c, again=again, say=lambda s: out.print(s, markup=False))
    out.print(table.summary(record))
    out.print(f"{c.output / 'comparison.md'}, comparison.csv, comparison.json", markup=False)
    failed = [row["cell"] for row in record["cells"] if row["failed"] or row["verify"] is False]
    if failed:
        raise LorakitError(f"failed or did not verify: {', '.join(failed)}; the other cells stand; running again tries the failed ones once more")
