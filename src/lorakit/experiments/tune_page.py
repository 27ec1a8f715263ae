"""The report of a search: one HTML file that needs no other, in the look of a comparison's."""

from __future__ import annotations

from typing import Any

from lorakit.experiments import findings, page, trial_charts
from lorakit.experiments.charts import esc
from lorakit.experiments.space import word
from lorakit.training.report import human

MARK = {"stopped": "stopped early", "failed": "failed", "diverged": "not finite", "running": "running"}


def _scroll(label: str, table: str) -> str:
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">{table}</div>'


def _trials(record: dict[str, Any]) -> str:
    names = [a["name"] for a in record["axes"]]
    heads = ["trial", record["metric"].replace("_", " "), *names, "steps", "tokens", "time", "ended"]
    left = ' class="text"'
    out = (f'<table class="main trials"><caption><span>{esc(record["metric"])} on the judging rows. A head sorts by its column; what was stopped or failed '
           'has no value.</span></caption><thead><tr>'
           + "".join(f'<th scope="col"{left * (h in (*names, "ended"))}><button type="button">{esc(h)}</button></th>' for h in heads) + "</tr></thead><tbody>")
    for r in findings.ranked(record["trials"], record["higher_is_better"]):
        best = r["number"] == record["best"]
        tags = '<span class="tag">best</span>' * best + '<span class="tag">default</span>' * r["default"]
        tags += f'<span class="tag bad">{MARK[r["state"]]}</span>' if r["state"] in ("failed", "diverged") else ""
        out += (f'<tr class="{"best" if best else ""}"><th scope="row" data-v="{r["number"]}">{r["number"]}{tags}</th>'
                f'<td data-v="{"" if r["value"] is None else r["value"]}">{human(r["value"])}</td>')
        for a, text in zip(record["axes"], findings.cells(record, r), strict=True):
            value = r["params"].get(a["key"])
            out += f'<td class="text" data-v="{value if isinstance(value, int | float) else esc(text) if a["key"] in r["params"] else ""}">{esc(text)}</td>'
        out += "".join(f'<td data-v="{r[u]}">{human(r[u], kind)}</td>' for u, kind in findings.COSTS.items())
        said = r["error"] if r["state"] == "failed" else MARK.get(r["state"], "finished") + f", begun {r['begun']} times" * (r["begun"] > 1)
        out += f'<td class="text" data-v="{r["state"]}">{esc(said)}</td></tr>'
    return _scroll("Trials", out + "</tbody></table>")


def _axes(record: dict[str, Any]) -> str:
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("parameter", "space", "default", "best", "share of what decides"))
    body = "".join(f'<tr><th scope="row">{esc(a["name"])}</th><td>{esc(a["space"])}</td><td>{esc(a["default"] or "—")}</td><td><b>{esc(a["best"] or "—")}</b>'
                   f"</td><td>{human(a['importance'], 'share')}</td></tr>" for a in record["axes"])
    return _scroll("Parameters", f'<table class="words"><caption>What was searched</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>')


def _choices(record: dict[str, Any]) -> str:
    """Of each parameter that is a choice: its values, their trials, their best."""
    low, high = trial_charts.limits(record["trials"], record["higher_is_better"])
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("value", "trials", "best", f"{human(low)} to {human(high)}"))
    pick, out = max if record["higher_is_better"] else min, ""
    for a in record["axes"]:
        if a["range"]:
            continue
        groups: dict[str, list[dict[str, Any]]] = {}
        for r in record["trials"]:
            if a["key"] in r["params"]:
                groups.setdefault(word(r["params"][a["key"]]), []).append(r)
        body = ""
        for value, rows in sorted(groups.items(), key=lambda g: -len(g[1])):
            good = [r["value"] for r in rows if r["value"] is not None]
            body += (f'<tr><th scope="row">{esc(value)}</th><td>{len(rows)}</td><td>{human(pick(good)) if good else "—"}</td>'
                     f"<td>{trial_charts.strip(rows, low, high)}</td></tr>")
        table = f'<table class="words"><caption><b>{esc(a["name"])}</b></caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
        out += f"<figure>{_scroll(esc(a['name']), table)}</figure>"
    return out


def _plots(record: dict[str, Any]) -> str:
    rows, metric, higher = record["trials"], record["metric"].replace("_", " "), record["higher_is_better"]
    figures = [(trial_charts.progress(rows, metric, higher), "Each trial in its order; the line is the best so far. Hollow: stopped early, where it was then."),
               (trial_charts.courses(rows, record["best"], metric, higher), "Each trial at its evaluations; in colour the best; a hollow end: stopped.")]
    return '<div class="plots">' + "".join(f"<figure>{svg}<figcaption>{text}</figcaption></figure>" for svg, text in figures) + "</div>"


def _slices(record: dict[str, Any]) -> str:
    rows, metric, higher = record["trials"], record["metric"].replace("_", " "), record["higher_is_better"]
    clouds = "".join(f"<figure>{trial_charts.cloud(rows, a, metric, higher)}</figure>" for a in record["axes"] if a["range"])
    return f'<div class="plots">{clouds}{_choices(record)}</div>'


def html(record: dict[str, Any]) -> str:
    """The whole report as one HTML text."""
    final = record["final"]
    failed = "".join(f"<li>{esc(x)}</li>" for x in findings.failures(record))
    measured = any(a["importance"] is not None for a in record["axes"])
    about = "The share is PED-ANOVA's (arXiv 2304.10255), from the finished trials; with few of them it is rough." if measured else ""
    parts = [
        ("On held-out data", "All training rows, data that no trial saw, seeds that no trial had.", page.cells_table(final)),
        ("What differs", "", page.what_differs(final)),
        ("What it took", "", f"<ul>{''.join(f'<li>{esc(x)}</li>' for x in findings.lines(record))}</ul>"),
        ("What was searched", about, _axes(record)),
        ("How it went", "Values far from the best stand at the edge.", _plots(record)),
        ("Each parameter", "A point is a trial; hollow ones were stopped early. The others of its parameters differ too.", _slices(record)),
        ("Trials", "", _trials(record)),
        ("Failures", "", f"<ul>{failed}</ul>" if failed else ""),
        ("The answer", "best.yaml, for lorakit train", f"<pre>{esc(record['yaml'])}</pre>"),
        ("How it was made", "", page.facts(record | {"jobs": max(1, record["workers"])})),
    ]
    s = record["settings"]["search"]
    told = (f"{len(record['trials'])} trials ({esc(s['sampler'])}, early stopping: {esc(s['early_stopping'])}) on {esc(record['base'])}, "
            f"{esc(record['data']['train'])}")
    return page.document(record, "search", told, "<br>".join(map(esc, findings.verdicts(record))), parts)
