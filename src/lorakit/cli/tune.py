"""lorakit tune: search for a better configuration within a budget, and tell whether it is better.

    lorakit tune search.yaml --dry-run                    # the space, how many trials, what they cost
    lorakit tune search.yaml                              # again after an interruption: what is finished stays; a second time beside it: joins
    lorakit tune search.yaml --set search.trials=40       # goes on with more trials
    lorakit train runs/search/best.yaml                   # the answer is a configuration

The file has the keys of `lorakit train` (base, data, adapter, hooks, train, eval), which are the default configuration, and:

    budget: {steps: 40}               # of each run; or tokens, or seconds inside training steps (with lr_scheduler_type: constant)
    seeds: 3                          # of the final comparison; or a list
    metric: eval_loss                 # or perplexity, accuracy, exact_match, preference_accuracy; f1, rouge_l, bleu without early stopping
    search:
      space:                          # a list is a choice, {low, high} a range; log: true, step: 4
        learning_rate: {low: 1e-4, high: 3e-2, log: true}
        method: [lora, dora, rslora]
        r: [4, 8, 16]
        target_modules: [[q_proj, v_proj], all-linear]
        adapter.init: [kaiming, pissa]
        hooks: [[], [{lora_plus: {ratio: 8}}]]
      trials: 20                      # and, or instead, budget: {steps: 600} of all trials together
      early_stopping: median          # or halving, or none
      sampler: tpe                    # or random
      seed: 1000                      # of the trials, the draws and the rows that judge
      fraction: 0.1                   # share of the training rows that judges
    whole_budget: false               # true: the default is also trained with all that the search cost
    output: runs/search

Keys are those of `train` with or without their group; an option that a method does not have is left out for it. Trial 0 is the default,
so the answer is never worse than it on the rows that judge. These are a part of the training rows; the held-out data is not seen before
the final comparison of the best with the default, on all training rows, with seeds of their own. The report says whether the best is
better, worse, or cannot be told from the default.

Trials are drawn by optuna, whose study is `study.db` (SQLite) in the output folder. Every trial has the schedule of its whole length. At
each evaluation (four in a run, or train.eval_steps) early stopping looks at it; what it stops has used fewer steps, and the budget of all
trials is counted in what was used. The command started again in the same folder, on this machine or another that shares the folder,
works on the same study; a trial whose process died is begun again under its number. A trial that fails is a row with its error.
The folder holds `report.html` (one file that needs no other), `tune.md`, `tune.csv`, `tune.json`, `best.yaml` and `final/`, a comparison.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.app import app, out, quiet
from lorakit.errors import LorakitError


@app.command()
def tune(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a setting, e.g. --set search.trials=40")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the space, the trials and what they cost; run nothing")] = False,
) -> None:
    """Search targets, ranks, methods, learning rates within a budget, and compare the best with the default on held-out data."""
    quiet()
    from lorakit.experiments import findings, search
    from lorakit.experiments import tune as e

    t = search.read(config, sets or [])
    if dry_run:
        for line in findings.planned(t):
            out.print(line, markup=False)
        return
    command = shlex.join(["lorakit", "tune", str(config), *(w for s in sets or [] for w in ("--set", s))])
    record = e.tune(t, command=command, say=lambda s: out.print(s, markup=False))
    out.print(findings.summary(record))
    out.print(f"{t.output / 'report.html'}, best.yaml, tune.md, tune.csv, tune.json, study.db", markup=False)
    failed = [row["cell"] for row in record["final"]["cells"] if row["failed"] or row["verify"] is False]
    if failed:
        raise LorakitError(f"failed or did not verify in the final comparison: {', '.join(failed)}; running again tries what failed once more")
