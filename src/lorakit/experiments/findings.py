"""What a search tells: its trials, what they cost, the answer, and whether it is better than the default; as Markdown, CSV, and for a terminal."""

from __future__ import annotations

import csv as comma
import io
from collections.abc import Sequence
from typing import Any

from lorakit.experiments import table
from lorakit.experiments.config import METRICS, amount
from lorakit.experiments.search import Tune
from lorakit.experiments.space import Range, short, word
from lorakit.training.report import human

COSTS = {"steps": "count", "tokens": "count", "seconds": "seconds"}
ANSWER, DEFAULT, WHOLE = "best", "default", "default-whole"  # cells of the final comparison


def summarise(t: Tune, metric: str, rows: list[dict[str, Any]], best: dict[str, Any], why: str, final: dict[str, Any],
              importance: dict[str, float]) -> dict[str, Any]:
    """What `tune.json` holds."""
    first = t.space.default(t.default.run)
    axes = [{"key": key, "name": short(key), "space": str(a), "log": isinstance(a, Range) and a.log, "range": isinstance(a, Range),
             "default": word(first[key]) if key in first else None, "best": word(best["params"][key]) if key in best["params"] else None,
             "importance": importance.get(key)} for key, a in t.space.axes.items()]
    states = [r["state"] for r in rows]
    return {"title": t.output.name, "metric": metric, "higher_is_better": METRICS[metric], "settings": t.settings.model_dump(mode="json"), "axes": axes,
            "trials": rows, "best": best["number"], "why": why, "states": {s: states.count(s) for s in dict.fromkeys(states)},
            "cost": {u: sum(r[u] for r in rows) for u in COSTS}, "workers": len({r["worker"] for r in rows if r["worker"]}),
            "begun_again": [r["number"] for r in rows if r["begun"] > 1], "final": final, "base": final["base"], "data": final["data"]} | _verdicts(
                final, best, rows)


def _verdicts(final: dict[str, Any], best: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    there = {c["cell"] for c in final["cells"]}
    if best["default"]:
        told = {"kind": "same", "text": f"The search found nothing better than the default configuration among {len(rows)} trials, so the answer is the "
                f"default itself: {final['metric']} {_mean(final, DEFAULT)} on held-out data."}
    else:
        told = verdict(final, ANSWER, DEFAULT, f"the best found (trial {best['number']})", "the default configuration")
    if WHOLE not in there:
        return {"verdict": told, "whole": None}
    name = DEFAULT if best["default"] else ANSWER
    return {"verdict": told, "whole": verdict(final, name, WHOLE, "the answer", "the default trained with all that the search and a run of the answer cost")}


def _cell(final: dict[str, Any], name: str) -> dict[str, Any]:
    return next(c for c in final["cells"] if c["cell"] == name)


def _mean(final: dict[str, Any], name: str) -> str:
    c = _cell(final, name)
    return table.pm(c["mean"], c["half"]) if c["mean"] is not None else "not measured"


def verdict(final: dict[str, Any], a: str, b: str, name_a: str, name_b: str) -> dict[str, Any]:
    """Whether cell a is better than cell b on held-out data: {kind: better, tie, worse, untested, failed; text}."""
    for name, told in ((a, name_a), (b, name_b)):
        c = _cell(final, name)
        if c["mean"] is None:
            return {"kind": "failed", "text": f"No verdict: {told} failed on the final data: {c['error']}"}
    figures = f"{final['metric']} {_mean(final, a)} against {_mean(final, b)}"
    d = next(d for d in final["differences"] if {d["a"], d["b"]} == {a, b})
    if d["p"] is None:
        return {"kind": "untested", "text": f"No verdict: {name_a} and {name_b}, {figures}; one seed (or one that is not finite) allows no test."}
    by = d["mean"] if d["a"] == a else -d["mean"]
    kind = "tie" if not d["distinguishable"] else "better" if (by > 0) == final["higher_is_better"] else "worse"
    lead = {"better": f"On held-out data {name_a} is better than {name_b}", "worse": f"On held-out data {name_a} is worse than {name_b}",
            "tie": f"On held-out data {name_a} cannot be told from {name_b}: no gain was shown"}[kind]
    spread = f" ± {human(d['half'])}" if d["half"] is not None else ""
    return {"kind": kind, "difference": by, "half": d["half"], "p": d["p"],
            "text": f"{lead}: {figures}, difference {human(by)}{spread} over {d['n']} seeds, paired, {table._p(d['p'])}."}


def ended(row: dict[str, Any], metric: str) -> str:
    """How a trial ended, in words."""
    after = f"{row['steps']} steps, {human(row['seconds'], 'seconds')}"
    return {"complete": lambda: f"{metric} {row['value']:.4g}, {after}", "failed": lambda: f"failed: {row['error']}", "running": lambda: "running",
            "stopped": lambda: f"stopped early after {after}", "diverged": lambda: f"not finite after {after}"}[row["state"]]()


def spent(record: dict[str, Any]) -> str:
    """What the search cost, beside the final runs."""
    cost, states = record["cost"], ", ".join(f"{n} {s}" for s, n in record["states"].items())
    seeds = len(record["settings"]["seeds"])
    return (f"The search took {len(record['trials'])} trials ({states}), the default among them, with {cost['steps']:,} steps, {cost['tokens']:,} tokens, "
            f"{human(cost['seconds'], 'seconds')} of training; it ended with: {record['why']}. Each final run has one trial's length, the default's as the "
            f"answer's, with {seeds} seed{'s' * (seeds > 1)}; the cost of the search comes on top of the answer's.")


def verdicts(record: dict[str, Any]) -> list[str]:
    """Whether the answer is better than the default, with the same run and, where it was asked for, with the same total."""
    return [v["text"] for v in (record["verdict"], record["whole"]) if v]


def lines(record: dict[str, Any]) -> list[str]:
    """The cost, the answer, what decides, in sentences."""
    out = [spent(record)]
    best = next(r for r in record["trials"] if r["number"] == record["best"])
    first = next(r for r in record["trials"] if r["default"])
    out.append(f"On the judging rows: trial {best['number']} {human(best['value'])}, the default "
               + (human(first["value"]) if first["state"] == "complete" else ended(first, record["metric"])) + ".")
    decides = sorted((a for a in record["axes"] if a["importance"] is not None), key=lambda a: -a["importance"])
    if decides:
        out.append("What decides (PED-ANOVA): " + ", ".join(f"{a['name']} {human(a['importance'], 'share')}" for a in decides) + ".")
    if again := record["begun_again"]:
        out.append(f"Begun again after a process ended: trial {', '.join(map(str, again))}.")
    return out


def failures(record: dict[str, Any]) -> list[str]:
    """The trials that failed, with their errors."""
    return [f"Trial {r['number']} failed: {r['error']}" for r in record["trials"] if r["state"] == "failed"]


def ranked(rows: Sequence[dict[str, Any]], higher: bool) -> list[dict[str, Any]]:
    """The trials, the best first, of equals the earlier, what has no value last."""
    return sorted(rows, key=lambda r: (r["value"] is None, (-1 if higher else 1) * (r["value"] or 0), r["number"]))


def cells(record: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """A trial's parameters as words, in the order of the axes."""
    return [word(row["params"][a["key"]]) if a["key"] in row["params"] else "—" for a in record["axes"]]


def csv(record: dict[str, Any]) -> str:
    """A line for each trial, plain numbers."""
    text = io.StringIO()
    out = comma.writer(text, lineterminator="\n")
    out.writerow(["number", "state", "default", record["metric"], *(a["key"] for a in record["axes"]), *COSTS, "begun", "error"])
    for r in record["trials"]:
        params = [v if isinstance(v := r["params"].get(a["key"]), int | float) or v is None else word(v) for a in record["axes"]]
        out.writerow([r["number"], r["state"], r["default"], r["value"], *params, *(r[u] for u in COSTS), r["begun"], r["error"]])
    return text.getvalue()


def markdown(record: dict[str, Any]) -> str:
    """Verdict, final comparison, trials and answer as a page."""
    def grid(heads: list[str], rows: list[list[str]]) -> list[str]:
        return ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1),
                *("| " + " | ".join(w.replace("|", "\\|") for w in row) + " |" for row in rows)]

    heads = ["trial", record["metric"], *(a["name"] for a in record["axes"]), "steps", "time", "ended"]
    rows = [[f"{r['number']}{' (default)' * r['default']}", human(r["value"]), *cells(record, r), human(r["steps"], "count"), human(r["seconds"], "seconds"),
             r["state"]] for r in ranked(record["trials"], record["higher_is_better"])]
    about = grid(["parameter", "space", "default", "best", "importance"],
                 [[a["name"], a["space"], a["default"] or "—", a["best"] or "—", human(a["importance"], "share")] for a in record["axes"]])
    told = [f"- {x}" for x in [*verdicts(record), *lines(record), *failures(record)]]
    return "\n".join([f"# {record['title']}", "", *told, "", "## On held-out data", "", table.markdown(record["final"]),
                      "## What was searched", "", *about, "", "## Trials", "", *grid(heads, rows), "", "## best.yaml", "", "```yaml",
                      record["yaml"].strip(), "```", ""])


def planned(t: Tune) -> list[str]:
    """What a search would do, before any of it."""
    s, first = t.search, t.space.default(t.default.run)
    out = [f"{short(key)}: {a}; default {word(first[key]) if key in first else 'not set'}" + ", outside of it" * (key in first and not a.has(first[key]))
           for key, a in t.space.axes.items()]
    each = ", ".join(f"{v:g} {u}" for u, v in t.default.budget.items()) or "as `train` says"
    most = " or ".join([*([f"{s.trials} trials"] if s.trials else []), *(f"{v:g} {u}" for u, v in amount(s.budget).items())])
    size = f"{t.space.size:,} configurations at most" if t.space.size is not None else "a continuum of configurations"
    out.append(f"{size}; drawn by {s.sampler}, early stopping: {s.early_stopping}")
    out.append(f"search: until {most}, the default among them; each trial {each}")
    unit = next(iter(t.default.budget), None)
    known = [amount(s.budget)[unit]] if unit in amount(s.budget) else []
    known += [s.trials * t.default.budget[unit]] if s.trials and unit else []
    cost = f"; the search takes {min(known):g} {unit} at most" if known else ""
    finals = len(t.settings.seeds) * (2 + t.settings.whole_budget)
    out.append(f"final: {finals} runs, the best and the default with seeds {', '.join(map(str, t.settings.seeds))}"
               + ", and the default with all that the search took" * t.settings.whole_budget + f"{cost}; nothing was run or written")
    return out


def summary(record: dict[str, Any]) -> Any:
    """The same for the terminal, as something rich prints."""
    from rich.console import Group
    from rich.table import Column, Table
    from rich.text import Text

    grid = Table("trial", record["metric"], *(Column(a["name"], justify="right") for a in record["axes"]), "ended", box=None, pad_edge=False)
    for r in ranked(record["trials"], record["higher_is_better"])[:8]:
        grid.add_row(f"{r['number']}{' (default)' * r['default']}", human(r["value"]), *map(Text, cells(record, r)), r["state"])
    more = len(record["trials"]) - 8
    told = [*(Text(x, "bold") for x in verdicts(record)), *map(Text, [*lines(record), *failures(record)])]
    return Group(grid, *([Text(f"and {more} more trials", "dim")] if more > 0 else []), table.summary(record["final"]), *told)
