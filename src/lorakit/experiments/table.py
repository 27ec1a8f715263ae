"""What a comparison tells: a row for each cell, what differs, what ties, the Pareto fronts; for a terminal, Markdown and CSV."""

from __future__ import annotations

import csv as comma
import io
import math
from pathlib import Path
from typing import Any

from lorakit.experiments import stats
from lorakit.formats.files import read_json
from lorakit.training.report import human

COLUMNS = ("cell", "before", "after", "seeds", "time", "tokens/s", "memory", "saved", "trained", "size", "merge loss", "verify")
FIELDS = ("cell", "kind", "mean", "half", "n", "before", "learning_rate", "rate_at_edge", "rates_tried", "train_seconds", "cpu_seconds", "tokens",
          "tokens_per_second", "peak_memory_bytes", "saved_bytes", "trainable", "adapter_bytes", "merge_loss", "forgetting", "verify", "failed", "error")
AVERAGED = ("train_seconds", "cpu_seconds", "tokens", "tokens_per_second", "saved_bytes", "trainable", "adapter_bytes", "merge_loss")
FRONTS = {"time": "train_seconds", "memory": "peak_memory_bytes", "size": "adapter_bytes"}  # what the metric is weighed against


def _mean(some: list[dict], key: str) -> float | None:
    values = [r[key] for r in some if r.get(key) is not None]
    return sum(values) / len(values) if values else None


def _cell(name: str, results: list[dict], metric: str, confidence: float) -> dict[str, Any]:
    good = [r for r in results if r["status"] == "ok"]
    bad = [r for r in results if r["status"] != "ok"]
    out: dict[str, Any] = dict.fromkeys(FIELDS) | {"cell": name, "n": len(good), "failed": len(bad), "error": bad[0]["error"] if bad else None,
                                                   "values": {}, "metrics": {}}
    if good:
        m = stats.mean([r["metrics"]["after"][metric] for r in good], confidence)
        checked = [r["verify"] for r in good if r["verify"] is not None]
        out |= {"mean": m.mean, "half": m.half, "before": sum(r["metrics"]["before"][metric] for r in good) / len(good),
                "values": {str(r["seed"]): r["metrics"]["after"][metric] for r in good}, "verify": all(checked) if checked else None,
                "peak_memory_bytes": max(r["peak_memory_bytes"] for r in good), "kind": good[0].get("kind"),
                "metrics": {k: sum(r["metrics"]["after"][k] for r in good) / len(good) for k in good[0]["metrics"]["after"] if k != metric}}
        out |= {k: _mean(good, k) for k in AVERAGED}
        if other := [r["elsewhere"] for r in good if r.get("elsewhere")]:
            changes = stats.mean([o["after"] - o["before"] for o in other], confidence)
            out |= {"forgetting": changes.mean, "forgetting_half": changes.half}
    return out


def summarise(results: list[dict[str, Any]], settings: dict[str, Any], metric: str, higher: bool) -> dict[str, Any]:
    """What `comparison.json` holds, from the results of all trials; the best cell first."""
    names, confidence = list(dict.fromkeys(r["cell"] for r in results)), settings["confidence"]
    cells = [_cell(n, [r for r in results if r["cell"] == n], metric, confidence) for n in names]
    cells.sort(key=lambda c: (c["mean"] is None or not math.isfinite(c["mean"]), 0 if c["mean"] is None else -c["mean"] if higher else c["mean"]))
    values = {c["cell"]: {int(s): v for s, v in c["values"].items()} for c in cells if c["values"]}
    fronts = {}
    for word, key in FRONTS.items():
        fronts[word] = stats.pareto({c["cell"]: (c["mean"], c[key]) for c in cells if c["mean"] is not None}, (higher, False))
    return {"metric": metric, "higher_is_better": higher, "settings": settings, "cells": cells, "pareto": fronts,
            "differences": [vars(d) for d in stats.differences(values, confidence)]}


def curves(folder: Path, cells: list[dict[str, Any]], points: int = 120) -> dict[str, dict[str, list[list[float]]]]:
    """Cell -> {loss, eval_loss: [[step, mean, lowest, highest] over seeds]}, from the runs' own histories."""
    out: dict[str, dict[str, list[list[float]]]] = {}
    for c in cells:
        found: dict[str, dict[float, list[float]]] = {"loss": {}, "eval_loss": {}}
        for seed in c["values"]:
            path = folder / c["cell"] / f"seed-{seed}" / "run.json"
            for entry in read_json(path)["history"] if path.is_file() else ():
                for key, steps in found.items():
                    if isinstance(entry.get(key), int | float) and math.isfinite(entry[key]):
                        steps.setdefault(entry["step"], []).append(entry[key])
        lines = {k: [[step, sum(v) / len(v), min(v), max(v)] for step, v in sorted(steps.items())] for k, steps in found.items()}
        out[c["cell"]] = {k: v[:: -(-len(v) // points) or 1] for k, v in lines.items() if v}
    return {k: v for k, v in out.items() if v}


def columns(record: dict[str, Any]) -> list[str]:
    """The heads of the table, with what this comparison has besides."""
    more = ["lr", *["tried"] * further(record)] if record.get("tuning") else []
    more += [k for k in record["settings"].get("metrics") or [] if k != record["metric"]]
    return [*COLUMNS[:4], *more, *(["forgetting"] if any(c["forgetting"] is not None for c in record["cells"]) else []), *COLUMNS[4:]]


def _rows(record: dict[str, Any]) -> list[list[str]]:
    heads, rows = columns(record), []
    for c in record["cells"]:
        if c["mean"] is None:
            rows.append([c["cell"], "—", "failed", "0", *["—"] * (len(heads) - 4)])
            continue
        word = {"cell": c["cell"], "before": human(c["before"]), "after": pm(c["mean"], c["half"]),
                "seeds": str(c["n"]) + (f" ({c['failed']} failed)" if c["failed"] else ""),
                "lr": rate(c), "tried": human(c["rates_tried"], "count"), "forgetting": pm(c["forgetting"], c.get("forgetting_half"), "+"),
                "time": human(c["train_seconds"], "seconds"),
                "tokens/s": human(c["tokens_per_second"], "count"), "memory": human(c["peak_memory_bytes"], "bytes"),
                "saved": human(c["saved_bytes"], "bytes"), "trained": human(c["trainable"], "count"), "size": human(c["adapter_bytes"], "bytes"),
                "merge loss": human(c["merge_loss"]), "verify": {True: "PASS", False: "FAIL", None: "—"}[c["verify"]]}
        rows.append([word[h] if h in word else human(c["metrics"].get(h)) for h in heads])
    return rows


def pm(mean: float | None, half: float | None, sign: str = "") -> str:
    """'1.234 ± 0.05'."""
    plus = sign if mean is not None and mean > 0 else ""
    return plus + human(mean) + (f" ± {human(half)}" if half is not None else "")


def rate(c: dict[str, Any]) -> str:
    """The learning rate, marked where it is the first or last that was tried."""
    return "—" if c.get("learning_rate") is None else f"{c['learning_rate']:g}" + " (edge)" * bool(c.get("rate_at_edge"))


def further(record: dict[str, Any]) -> bool:
    """Whether cells may have tried rates past the grid, and so not all the same number."""
    return bool((record["settings"]["tune"] or {}).get("extend"))


def tuned(record: dict[str, Any]) -> str:
    """How the learning rates were chosen, in a sentence; empty where they were given."""
    if not record.get("tuning"):
        return ""
    t = record["settings"]["tune"]
    grid, budget = ", ".join(f"{x:g}" for x in t["learning_rate"]), ", ".join(f"{v:g} {k}" for k, v in t["budget"].items() if v is not None)
    on = (f" and, while the best was the first or last, on past it by the same ratio, at most {t['extend']} further for each cell,"
          if further(record) else "")
    return (f"Learning rates were chosen for each cell from {grid}{on} with {budget} for each trial and the seed {t['seed']}, judged on a part of the training "
            "rows that is not in the final evaluation")


def notes(record: dict[str, Any]) -> list[str]:
    """Below the table: errors, what differs and what does not, the fronts, in sentences."""
    share, out = f"{record['settings']['confidence'] * 100:g} %", []
    if record.get("tuning"):
        many = {t["cell"]: f" ({len(t['values'])} tried)" * further(record) for t in record["tuning"]}
        out.append(f"{tuned(record)}: " + ", ".join((f"{t['cell']} {t['rate']:g}" if t["rate"] else f"{t['cell']} none") + many[t["cell"]]
                                                    for t in record["tuning"]) + ".")
    for t in record.get("tuning", []):
        if t["edge"]:
            what = f"{len(t['values'])} rates tried" if further(record) else "grid"
            out.append(f"{t['cell']}: the learning rate {t['rate']:g} is at the edge of the {what}; a wider grid might find a better one.")
    for c in record["cells"]:
        if c["failed"]:
            out.append(f"{c['cell']} failed with {c['failed']} of {c['failed'] + c['n']} seeds: {c['error']}")
        if c["mean"] is not None and not math.isfinite(c["mean"]):
            out.append(f"{c['cell']} diverged: {record['metric']} is not finite with at least one seed, so it is neither ranked nor tested.")
    if any(c["n"] == 1 for c in record["cells"]):
        out.append("One seed gives no interval and no test; more seeds do.")
    tested = [d for d in record["differences"] if d["p"] is not None]
    apart, ties = [d for d in tested if d["distinguishable"]], [d for d in tested if not d["distinguishable"]]
    if tested:
        out.append(f"Differences at {share} over {len(tested)} pairs (paired by seed, Holm): " + ("none." if not apart else ""))
    for d in apart:
        first, second, by = (d["a"], d["b"], d["mean"]) if (d["mean"] > 0) == record["higher_is_better"] else (d["b"], d["a"], -d["mean"])
        spread = f" ± {human(d['half'])}" if d["half"] is not None else ""
        out.append(f"  {first} is better than {second}: {record['metric']} {human(by)}{spread}, {_p(d['p'])}")
    if ties:
        out.append("Not distinguishable: " + "; ".join(f"{d['a']} and {d['b']} ({_p(d['p'])})" for d in ties))
    out += [f"Best for its {word} (Pareto front): {', '.join(names)}" for word, names in record["pareto"].items() if names]
    return out


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def title(record: dict[str, Any]) -> str:
    """The metric, which way is better, and what the figures are."""
    way = "higher" if record["higher_is_better"] else "lower"
    return f"{record['metric']} ({way} is better), mean ± half of the {record['settings']['confidence'] * 100:g} % interval over seeds; time is training alone"


def csv(record: dict[str, Any]) -> str:
    """A line for each cell, plain numbers, the value of every seed at the end."""
    seeds = [str(s) for s in record["settings"]["seeds"]]
    text = io.StringIO()
    out = comma.writer(text, lineterminator="\n")
    more = list(dict.fromkeys(k for c in record["cells"] for k in c["metrics"]))
    out.writerow([*FIELDS, *more, *(f"seed_{s}" for s in seeds)])
    for c in record["cells"]:
        out.writerow([*(c[k] for k in FIELDS), *(c["metrics"].get(k) for k in more), *(c["values"].get(s) for s in seeds)])
    return text.getvalue()


def markdown(record: dict[str, Any]) -> str:
    """The table and the notes as a page."""
    heads = columns(record)
    lines = [title(record), "", "| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    lines += ["| " + " | ".join(w.replace("|", "\\|") for w in row) + " |" for row in _rows(record)]
    return "\n".join([*lines, "", *(f"- {n.strip()}" for n in notes(record))]) + "\n"


def summary(record: dict[str, Any]) -> Any:
    """The same for the terminal, as something rich prints."""
    from rich.console import Group
    from rich.table import Column, Table
    from rich.text import Text

    rows, heads = _rows(record), columns(record)
    wide = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]  # a narrow terminal wraps lines, not figures
    grid = Table(*(Column(c, justify="right" if n else "left", min_width=w) for n, (c, w) in enumerate(zip(heads, wide, strict=True))),
                 box=None, pad_edge=False)
    for row in rows:
        grid.add_row(*(Text(w, "bold red" if w in ("failed", "FAIL") else "") for w in row))
    return Group(Text(title(record), "bold"), grid, *(Text(n) for n in notes(record)))
