"""lorakit compare: several configurations on one base and one task, several seeds each, with what differs and what ties.

    lorakit compare cells.yaml --dry-run     # the cells and seeds it would run
    lorakit compare cells.yaml               # again after an interruption: what is finished stays, the rest is run
    lorakit compare cells.yaml --again       # runs anew what was made with other settings

The file has the keys of `lorakit train` (base, data, train, eval), which hold for all cells, and:

    seeds: 3                          # or a list; of data order, dropout, the adapter's start
    budget: {tokens: 200000}          # or steps, or seconds inside training steps (with lr_scheduler_type: constant)
    metric: eval_loss                 # or perplexity, accuracy, f1, exact_match, rouge_l, bleu, preference_accuracy
    metrics: [rouge_l, bleu]          # measured besides (packages: pip install 'lorakit[metrics]'); f1 where rows have classes
    tune: {learning_rate: [1e-3, 3e-3, 1e-2], budget: {steps: 40}, seed: 1000, fraction: 0.1, extend: 3}
    forgetting: other.jsonl           # other data, its loss before and after; or {data: …, limit: 200}
    cells:
      - {name: base, base: true}      # the untouched base; the same as adapter: none
      - {name: lora8, adapter: {method: lora, r: 8}}
      - {name: dora8, adapter: {method: dora, r: 8}, train: {batch_size: 4}}
      - {name: full, adapter: full}   # all targeted weights train
      - {name: everything, backend: transformers, adapter: full}       # every weight of the model trains, without lorakit's layers
      - {name: probe, adapter: linear-probe}                           # only a classifier's head trains
      - {name: peft-lora8, backend: peft, adapter: {method: lora, r: 8}}   # PEFT's own layers in the same training loop
    grid: {adapter.method: [lora, rslora], adapter.r: [4, 16]}
    output: runs/comparison

`tune` tries every learning rate of the grid on every cell with one budget and a seed of its own. What judges is a `fraction` of the
training rows, on which the trials do not train; the final evaluation is not seen. The best rate serves all seeds of its cell. Where the
best is the first or last of the grid, `extend` (0 by default) lets the cell go on past it by the same ratio, until the best is inside or
so many trials more were used: as many at most for every cell. The report shows what each cell tried and chose, how many trials it used,
and says where the choice is still the first or last of them. Without `data.eval` the held-out part is the same for all seeds;
`data: {split_seed: 1}` is another one. With `backend: peft` the options are those of PEFT's configurations (any of them: `method: ia3`,
`vera`, `oft`, …; dora, rslora, pissa and olora are its LoraConfig with a switch), and the learning loop, the order of the data, the loss
and what is measured are the same as for lorakit's cells.

Each cell with each seed is a run folder, made in a process of its own, so that peak memory is its own (on a CPU with Python and its
libraries in it) and a failure is a row with its error. Time is that of the training steps alone. `saved` is what the forward pass of
one training batch keeps for the backward pass, to the byte; `merge loss` is how far the logits move when the adapter is merged, as a
share of them. With --jobs 2, or with the same command started a second time, cells run at the same time, each in one process; times
are then those of a shared machine (CPU time, in the report and the CSV, suffers less). Intervals are Student's; differences are paired
by seed and corrected for all pairs (Holm); what is not distinguishable is called so. A token budget ends at the first step that reaches
it. The folder holds `report.html` (one file that needs no other), `comparison.md`, `comparison.csv` and `comparison.json`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.app import app, out, quiet
from lorakit.errors import LorakitError


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    again: Annotated[bool, typer.Option("--again", help="run anew what was made with other settings")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="cells that run at the same time")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the cells and seeds, run nothing")] = False,
) -> None:
    """Compare configurations fairly: equal budget, several seeds, intervals, what differs and what ties. Exits with 1 if a cell fails."""
    quiet()
    from lorakit.experiments import compare as e
    from lorakit.experiments import config as settings
    from lorakit.experiments import table

    c = settings.read(config)
    if dry_run:
        todo = e.plan(c.trials, again) if not c.tuning else [(t, {}, True) for t in c.trials]
        for name in c.cells:
            mine = [(t, run) for t, _, run in todo if t.cell == name]
            seeds = ", ".join(str(t.seed) + ("" if run else " (finished)") for t, run in mine)
            trial = mine[0][0]
            what = {"none": "the untouched base", "full": "every weight", "probe": "the classifier's head"}.get(trial.kind) or ", ".join(
                f"{k}: {v}" for k, v in (trial.peft or trial.run.adapter).items()) + " by PEFT" * (trial.kind == "peft")
            rate = "" if trial.untouched else "; learning_rate: tuned" if c.tuning else f"; learning_rate: {trial.run.train.learning_rate:g}"
            out.print(f"{name}  seeds {seeds}  {what}{rate}", markup=False)
        budget = ", ".join(f"{v:g} {k}" for k, v in c.trials[0].budget.items()) or "none: `train` says how long"
        if c.tuning:
            grid = ", ".join(f"{t.tunes:g}" for t in c.tuning if t.cell == c.tuning[0].cell)
            more = f", up to {c.settings.tune.extend} more for each cell whose best is the last" * bool(c.settings.tune.extend)
            out.print(f"tuning: {len(c.tuning)} trials before them, learning_rate {grid}{more}; what is finished is told when it runs", markup=False)
        out.print(f"{sum(run for *_, run in todo)} runs; budget of each: {budget}; nothing was run or written", markup=False)
        return
    command = shlex.join(["lorakit", "compare", str(config), *["--again"] * again, *(["--jobs", str(jobs)] if jobs > 1 else [])])
    record = e.compare(c, again=again, jobs=jobs, command=command, say=lambda s: out.print(s, markup=False))
    out.print(table.summary(record))
    out.print(f"{c.output / 'report.html'}, comparison.md, comparison.csv, comparison.json", markup=False)
    failed = [row["cell"] for row in record["cells"] if row["failed"] or row["verify"] is False]
    if failed:
        raise LorakitError(f"failed or did not verify: {', '.join(failed)}; the other cells stand; running again tries the failed ones once more")
