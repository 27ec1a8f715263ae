"""A comparison: learning rates are tuned, then every cell runs with every seed, each in a process of its own; then the table.

    runs/comparison/<cell>/seed-<n>/      a run folder with cell.json (what it is) and result.json (how it ended)
    runs/comparison/<cell>/tune-<rate>/   the same, of a trial that chooses the learning rate, of the grid or past its end
    runs/comparison/tuning/               the rows that these trials train on and are judged by
    runs/comparison/report.html  comparison.md  .csv  .json

Each trial is claimed by a lock, so several processes on one folder share the work.
"""

from __future__ import annotations

import time
from typing import Any

from lorakit.errors import LorakitError
from lorakit.experiments import machine, page, table
from lorakit.experiments.config import METRICS, Compare
from lorakit.experiments.locks import shared
from lorakit.experiments.rates import choices, early, on_rows_of_their_own, onward
from lorakit.experiments.runs import Say, digest, failed, plan, run_all
from lorakit.formats.files import read_json, writing
from lorakit.training.prepare import Prepared, of_tasks, prepare


def metric(c: Compare, p: Prepared) -> str:
    """The metric that is compared. LorakitError where the data does not give the one that was asked for."""
    from lorakit.experiments import measure

    if p.heldout is None:
        raise LorakitError("a comparison needs held-out data; mend: data.eval, or data.eval_fraction above 0")
    given = ["accuracy"] if p.labels else ["exact_match"] * ("exact_match" in p.run.eval.metrics) + ["preference_accuracy"] * (p.shape == "preference")
    given += ["eval_loss"] if p.labels else ["eval_loss", "perplexity"]
    given += measure.given(p)
    want = c.settings.metric or given[0]
    if want not in given:
        how = "; mend: eval: {metrics: [exact_match]}" if want == "exact_match" and not p.labels and p.shape != "text" else ""
        raise LorakitError(f"metric: {want} is not measured on data of shape {p.shape}, only {', '.join(given)}{how}")
    measure.check(c.trials[0].extra, p)
    kinds = {t.cell: t.kind for t in c.trials}
    if not p.labels and "probe" in kinds.values():
        raise LorakitError(f"cell `{next(k for k, v in kinds.items() if v == 'probe')}`: a linear probe trains a classifier's head, and data of shape "
                           f"{p.shape} has no classes")
    if "tokens" in {k for t in [*c.trials, *c.tuning] for k in t.budget} and p.shape == "preference":
        raise LorakitError("budget.tokens: pairs of answers are not counted in tokens; mend: a budget of steps or seconds")
    if c.settings.forgetting:
        measure.Elsewhere(p.run, c.settings.forgetting.model_dump(), p)
    return want


def compare(c: Compare, *, again: bool = False, jobs: int = 1, say: Say = print, command: str = "") -> dict[str, Any]:
    """Runs what is not finished and returns what `comparison.json` holds. A cell that fails is a row with its error."""
    if jobs < 1:
        raise LorakitError(f"--jobs must be at least 1, not {jobs}")
    tune = c.settings.tune and c.settings.tune.model_dump()
    with shared(c.output, digest([tune, *(t.settings() for t in [*c.tuning, *c.trials])])):
        p = prepare(next((t.run for t in c.trials if of_tasks(t.run)), c.trials[0].run))  # with the rows' tasks where a cell trains by them
        name = metric(c, p)
        begun, chosen = time.time(), {}
        if c.tuning:
            trials = on_rows_of_their_own(c, p)
            todo = plan(trials, again)
            plan(early(c, trials, todo, name, again), again)
            what = f"{len({t.cell for t in trials})} cells × {len(c.settings.tune.learning_rate)} learning rates"
            while todo:
                left = sum(run for *_, run in todo)
                say(f"tuning: {what}: {left} to run, {len(todo) - left} finished before")
                run_all(todo, jobs, begun, say, name)
                more = onward(c, trials, name)
                trials, todo, what = [*trials, *more], plan(more, again), f"one rate past the last, {len(more)} cells"
            chosen = choices(c, trials, name)
            for one in chosen.values():
                edge = f", at the edge of the {len(one['values'])} tried" * one["edge"]
                say(f"{one['cell']}: learning rate " + (f"{one['rate']:g}{edge}" if one["rate"] else "not found"))
        finals = [t.rated(chosen[t.cell]["rate"]) if chosen.get(t.cell, {}).get("rate") else t for t in c.trials]
        todo = plan(finals, again)
        stuck = {cell for cell, one in chosen.items() if one["rate"] is None}
        left = sum(run for *_, run in todo)
        say(f"{len(c.cells)} cells × {len(c.settings.seeds)} seeds: {left} to run, {len(todo) - left} finished before")
        for trial, now, run in todo:
            if run and trial.cell in stuck:
                errors = chosen[trial.cell]["errors"]
                failed(trial, now, "no learning rate of the grid could be trained: " + (next(iter(errors.values())) if errors else "all diverged"), begun)
        run_all([one for one in todo if one[0].cell not in stuck], jobs, begun, say, name)
        results = [read_json(t.folder / "result.json") for t in finals]
        record = table.summarise(results, c.settings.model_dump(), name, METRICS[name])
        record |= {"tuning": list(chosen.values()), "machine": machine.describe(results), "command": command, "jobs": jobs, "title": c.output.name,
                   "base": p.run.base.path, "data": {"train": p.run.data.train, "eval": p.run.data.eval, "shape": p.shape, "rows": len(p.rows),
                                                     "eval_rows": len(p.held)},
                   "curves": table.curves(c.output, record["cells"])}
        for row in record["cells"]:
            one = chosen.get(row["cell"])
            row |= {"learning_rate": next(t.run.train.learning_rate for t in finals if t.cell == row["cell"]) if row["kind"] != "none" else None,
                    "rate_at_edge": one["edge"] if one else None, "rates_tried": len(one["values"]) if one else None}
        with writing(c.output) as w:
            w.json("comparison.json", record)
            w.text("comparison.csv", table.csv(record))
            w.text("comparison.md", table.markdown(record))
            w.text("report.html", page.html(record))
        return record


