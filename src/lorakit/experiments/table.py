"""What a comparison tells: a row for each cell, what differs, what ties, the Pareto fronts; for a terminal, Markdown and CSV."""

from __future__ import annotations

import csv as comma
import io
import math
from typing import Any

from lorakit.experiments import stats
from lorakit.training.report import human

COLUMNS = ("cell", "before", "after", "seeds", "time", "tokens/s", "memory", "trained", "size", "verify")
FIELDS = ("cell", "mean", "half", "n", "before", "train_seconds", "tokens", "tokens_per_second", "peak_memory_bytes", "trainable", "adapter_bytes", "verify",
          "failed", "error")


def _mean(some: list[dict], key: str) -> float | None:
    values = [r[key] for r in some if r.get(key) is not None]
    return sum(values) / len(values) if values else None


def _cell(name: str, results: list[dict], metric: str, confidence: float) -> dict[str, Any]:
    good = [r for r in results if r["status"] == "ok"]
    bad = [r for r in results if r["status"] != "ok"]
    out: dict[str, Any] = dict.fromkeys(FIELDS) | {"cell": name, "n": len(good), "failed": len(bad), "error": bad[0]["error"] if bad else None, "values": {}}
    if good:
        m = stats.mean([r["metrics"]["after"][metric] for r in good], confidence)
        checked = [r["verify"] for r in good if r["verify"] is not None]
        out |= {"mean": m.mean, "half": m.half, "before": sum(r["metrics"]["before"][metric] for r in good) / len(good),
                "values": {str(r["seed"]): r["metrics"]["after"][metric] for r in good}, "verify": all(checked) if checked else None,
                "peak_memory_bytes": max(r["peak_memory_bytes"] for r in good)}
        out |= {k: _mean(good, k) for k in ("train_seconds", "tokens", "tokens_per_second", "trainable", "adapter_bytes")}
    return out


def summarise(results: list[dict[str, Any]], settings: dict[str, Any], metric: str, higher: bool) -> dict[str, Any]:
    """What `comparison.json` holds, from the results of all trials; the best cell first."""
    names, confidence = list(dict.fromkeys(r["cell"] for r in results)), settings["confidence"]
    cells = [_cell(n, [r for r in results if r["cell"] == n], metric, confidence) for n in names]
    cells.sort(key=lambda c: (c["mean"] is None or not math.isfinite(c["mean"]), 0 if c["mean"] is None else -c["mean"] if higher else c["mean"]))
    values = {c["cell"]: {int(s): v for s, v in c["values"].items()} for c in cells if c["values"]}
    fronts = {}
    for key, word in (("train_seconds", "time"), ("trainable", "parameters")):
        fronts[word] = stats.pareto({c["cell"]: (c["mean"], c[key]) for c in cells if c["mean"] is not None}, (higher, False))
    return {"metric": metric, "higher_is_better": higher, "settings": settings, "cells": cells, "pareto": fronts,
            "differences": [vars(d) for d in stats.differences(values, confidence)]}


def _rows(record: dict[str, Any]) -> list[list[str]]:
    rows = []
    for c in record["cells"]:
        if c["mean"] is None:
            rows.append([c["cell"], "—", "failed", "0", *["—"] * 6])
            continue
        after = human(c["mean"]) + (f" ± {human(c['half'])}" if c["half"] is not None else "")
        seeds = str(c["n"]) + (f" ({c['failed']} failed)" if c["failed"] else "")
        rows.append([c["cell"], human(c["before"]), after, seeds, human(c["train_seconds"], "seconds"), human(c["tokens_per_second"], "count"),
                     human(c["peak_memory_bytes"], "bytes"), human(c["trainable"], "count"), human(c["adapter_bytes"], "bytes"),
                     {True: "PASS", False: "FAIL", None: "—"}[c["verify"]]])
    return rows


def notes(record: dict[str, Any]) -> list[str]:
    """Below the table: errors, what differs and what does not, the fronts, in sentences."""
    share, out = f"{record['settings']['confidence'] * 100:g} %", []
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
    out.writerow([*FIELDS, *(f"seed_{s}" for s in seeds)])
    for c in record["cells"]:
        out.writerow([*(c[k] for k in FIELDS), *(c["values"].get(s) for s in seeds)])
    return text.getvalue()


def markdown(record: dict[str, Any]) -> str:
    """The table and the notes as a page."""
    lines = [title(record), "", "| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(w.replace("|", "\\|") for w in row) + " |" for row in _rows(record)]
    return "\n".join([*lines, "", *(f"- {n.strip()}" for n in notes(record))]) + "\n"


def summary(record: dict[str, Any]) -> Any:
    """The same for the terminal, as something rich prints."""
    from rich.console import Group
    from rich.table import Column, Table
    from rich.text import Text

    rows = _rows(record)
    wide = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]  # a narrow terminal wraps lines, not figures
    grid = Table(*(Column(c, justify="right" if n else "left", min_width=w) for n, (c, w) in enumerate(zip(COLUMNS, wide, strict=True))),
                 box=None, pad_edge=False)
    for row in rows:
        grid.add_row(*(Text(w, "bold red" if w in ("failed", "FAIL") else "") for w in row))
    return Group(Text(title(record), "bold"), grid, *(Text(n) for n in notes(record)))
