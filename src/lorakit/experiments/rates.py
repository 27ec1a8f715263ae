"""The learning rate of each cell of a comparison: a grid of trials, judged on rows of their own, the walk past its end, and the choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lorakit.experiments.config import METRICS, Compare, Trial
from lorakit.experiments.rows import apart
from lorakit.experiments.runs import Todo, plan
from lorakit.formats.files import read_json
from lorakit.training.prepare import Prepared


def on_rows_of_their_own(c: Compare, p: Prepared) -> list[Trial]:
    """The tuning trials on the training rows of the comparison, a part of them held out. The final evaluation is not seen."""
    change = apart(p, c.settings.tune.fraction, c.settings.tune.seed, c.output / "tuning")
    return [one.on(change) for one in c.tuning]


def choose(cell: str, tried: dict[float, dict[str, Any]], name: str, higher: bool) -> dict[str, Any]:
    """The learning rate of a cell from its trials' results: the best metric, the lower loss where two are equal, then the lower rate."""
    values, best = {}, []
    for rate, result in sorted(tried.items()):
        after = result["metrics"]["after"] if result["status"] == "ok" else {}
        value, loss = after.get(name, math.nan), after.get("eval_loss", 0.0)
        values[f"{rate:g}"] = value if math.isfinite(value) else None
        if math.isfinite(value):
            best.append((-value if higher else value, loss if math.isfinite(loss) else math.inf, rate))
    rate = min(best)[2] if best else None
    return {"cell": cell, "values": values, "rate": rate, "edge": rate is not None and rate in (min(tried), max(tried)),
            "seconds": sum(r.get("train_seconds") or 0.0 for r in tried.values()),
            "errors": {f"{k:g}": r["error"] for k, r in sorted(tried.items()) if r["status"] != "ok"}}


def choices(c: Compare, trials: Sequence[Trial], name: str) -> dict[str, dict[str, Any]]:
    """Cell -> its choice, from the results of these trials."""
    out = {}
    for cell in dict.fromkeys(t.cell for t in trials):
        tried = {t.tunes: read_json(t.folder / "result.json") for t in trials if t.cell == cell}
        out[cell] = choose(cell, tried, name, METRICS[name])
    return out


def onward(c: Compare, trials: Sequence[Trial], name: str) -> list[Trial]:
    """The next trial of each cell whose best rate x is the last that was tried, y beside it: x² / y, while `extend` allows one more."""
    out = []
    for cell, one in choices(c, trials, name).items():
        mine = sorted((t for t in trials if t.cell == cell), key=lambda t: t.tunes)
        if one["edge"] and len(mine) < len(c.settings.tune.learning_rate) + c.settings.tune.extend:
            x, y = (mine[n].tunes for n in ((0, 1) if one["rate"] == mine[0].tunes else (-1, -2)))
            out.append(mine[0].trying(float(f"{x * x / y:g}")))
    return out


def early(c: Compare, trials: Sequence[Trial], todo: Todo, name: str, again: bool) -> list[Trial]:
    """The runs that count of the cells whose rate is chosen already: what was made with other settings is refused before anything runs."""
    left = {t.cell for t, _, run in todo if run}
    tried = [t for t in trials if t.cell not in left]
    while more := onward(c, tried, name):
        left = {t.cell for t, _, run in plan(more, again) if run}
        tried = [t for t in [*tried, *more] if t.cell not in left]
    chosen = choices(c, tried, name)
    return [t.rated(chosen[t.cell]["rate"]) for t in c.trials if t.cell in chosen and chosen[t.cell]["rate"]]


