"""The report of a comparison: one HTML file that needs no other, for a screen, a phone, the dark and paper."""

from __future__ import annotations

import math
from typing import Any

import yaml

from lorakit.experiments import charts, table
from lorakit.experiments.charts import esc
from lorakit.training.report import human

CSS = """:root{color-scheme:light dark;--bg:#fff;--ink:#1c2526;--mut:#56656a;--line:#dde4e4;--soft:#f3f6f6;--acc:#0f6e6e;--mark:#e0f0ee;--bad:#b3261e}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14191a;--ink:#e4eaea;--mut:#9dabaf;--line:#2f393b;--soft:#1b2223;--acc:#5fc3bd;--mark:#17332f;
--bad:#ff8f85}}*{box-sizing:border-box}body{margin:0 auto;max-width:1240px;padding:44px 32px 64px;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,"Segoe UI",Roboto,Arial,sans-serif;font-variant-numeric:tabular-nums}h1,h2,p,figure{margin:0}h1{font-size:30px;line-height:1.25;
margin:2px 0 6px;overflow-wrap:anywhere}h2{font-size:18px}h1,h2,b{font-weight:600}small,.note,figcaption{font-size:13px;color:var(--mut)}
section{margin-top:34px;padding-top:18px;border-top:1px solid var(--line)}.note{margin:2px 0 12px;max-width:90ch}.lead{font-size:17px;max-width:80ch;
margin-top:14px;padding:12px 18px;background:var(--soft);border-left:3px solid var(--acc)}ul{margin:8px 0;padding-left:20px;max-width:110ch}
li{margin:3px 0;overflow-wrap:anywhere}.scroll{overflow-x:auto}table{border-collapse:collapse}caption{text-align:left;font-size:13px;color:var(--mut);
padding-bottom:8px;caption-side:top}caption span{display:block;position:sticky;left:0;width:min(90ch,88vw);white-space:normal}th,td{padding:6px 14px 6px 0;
text-align:right;vertical-align:middle;border-bottom:1px solid var(--line);white-space:nowrap}thead th{vertical-align:bottom;font-weight:400}
th:first-child,td.text{text-align:left}tbody th{font-weight:600;position:sticky;left:0;background:var(--bg);padding-left:8px}
thead th:first-child{padding-left:8px}thead button{font:inherit;font-size:13px;color:var(--mut);background:none;border:0;padding:0;cursor:pointer;
text-align:inherit}thead button:hover,thead [aria-sort] button{color:var(--ink)}thead button::after{content:"";display:inline-block;width:1.1em}
[aria-sort=ascending] button::after{content:" ↑"}[aria-sort=descending] button::after{content:" ↓"}tr.best>*,tr.tied>*{background:var(--mark)}
.tag{font-size:11px;font-weight:400;color:var(--acc);border:1px solid var(--acc);border-radius:3px;padding:0 4px;margin-left:6px;display:inline-block
}.bad{color:var(--bad);
border-color:var(--bad)}svg{display:block;overflow:visible}svg text{font-size:11.5px;fill:var(--mut);paint-order:stroke;stroke:var(--bg);stroke-width:3px;
stroke-linejoin:round}svg text.on{fill:var(--ink);font-weight:600}.bar{width:120px;height:16px}.axis,.grid{stroke:var(--line);stroke-width:1}
.span{stroke:var(--acc);stroke-width:2;opacity:.55}.dot,circle.on{fill:var(--acc)}circle.off{fill:var(--bg);stroke:var(--mut);stroke-width:1.5}
.front{fill:none;stroke:var(--acc);stroke-width:1.5;stroke-dasharray:4 3}.leader{stroke:var(--mut);stroke-width:.7}.plots{display:grid;gap:30px 36px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,500px),1fr))}.plot{width:100%;height:auto}.curves{display:grid;gap:18px 24px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,255px),1fr))}.curve{width:100%;height:auto}.curve text{font-size:10.5px}.other{fill:none;
stroke:var(--line);stroke-width:1}.mine{fill:none;stroke:var(--acc);stroke-width:1.8}.band{fill:var(--acc);opacity:.2}circle.eval{fill:var(--ink)}
figcaption b{color:var(--ink)}figure,tr{break-inside:avoid}pre{margin:6px 0 0;padding:10px 14px;background:var(--soft);
font:12.5px/1.45 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}.facts th{position:static;font-weight:400;
color:var(--mut);padding-left:0}.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}.words td,.words th{white-space:normal;
vertical-align:top;text-align:left;min-width:7em}@media(max-width:600px){body{padding:24px 16px}h1{font-size:24px}.plot{min-width:520px}
.plots figure{overflow-x:auto}tbody th{max-width:40vw;white-space:normal;overflow-wrap:anywhere}}@media print{@page{size:A4 landscape;margin:11mm}
body{padding:0;max-width:none;font-size:9.5pt;print-color-adjust:exact}.scroll{overflow:visible}table.main{width:100%;font-size:7.2pt}
.main th,.main td{padding:3px 5px 3px 0}.main tbody th{position:static;white-space:normal;overflow-wrap:anywhere}thead button{font-size:7.2pt;
white-space:normal;word-break:normal}.main thead th{white-space:normal}thead button::after{width:0}thead{display:table-header-group}.bar{width:70px}
.tag{font-size:6pt}h2,.note,caption{break-after:avoid}.plots{grid-template-columns:1fr 1fr}.curves{grid-template-columns:repeat(4,1fr)}
.main td.tok,.main th.tok{display:none}}.strip{width:150px;height:16px}.strip circle{opacity:.75}
.trials td.text{white-space:normal;min-width:5em;max-width:24em;overflow-wrap:anywhere}
.trials th.text{text-align:left}"""

SCRIPT = """document.querySelectorAll('table.main thead button').forEach((b,i)=>b.addEventListener('click',()=>{const th=b.closest('th'),
t=th.closest('table'),n=th.cellIndex,up=th.getAttribute('aria-sort')!=='ascending',body=t.tBodies[0],val=r=>r.cells[n].dataset.v??'';
t.querySelectorAll('th[aria-sort]').forEach(x=>x.removeAttribute('aria-sort'));th.setAttribute('aria-sort',up?'ascending':'descending');
[...body.rows].sort((x,y)=>{const a=val(x),b=val(y);if(a===''||b==='')return(a==='')-(b==='');const d=isNaN(a)||isNaN(b)?a.localeCompare(b):a-b;
return up?d:-d}).forEach(r=>body.append(r))}));"""

AXES = {"time": ("training time", "seconds"), "memory": ("peak memory", "bytes"), "size": ("size on disk", "bytes")}


def ties(record: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Cell -> {better, tie, worse}: the cells that it beats, that it cannot be told from, that beat it."""
    out = {c["cell"]: {"better": [], "tie": [], "worse": []} for c in record["cells"] if c["mean"] is not None}
    for d in record["differences"]:
        if d["p"] is None:
            continue
        for a, b, mean in ((d["a"], d["b"], d["mean"]), (d["b"], d["a"], -d["mean"])):
            out[a]["tie" if not d["distinguishable"] else "better" if (mean > 0) == record["higher_is_better"] else "worse"].append(b)
    return out


def best(record: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The best cell, and what cannot be told from it."""
    first = next((c["cell"] for c in record["cells"] if c["mean"] is not None and math.isfinite(c["mean"])), None)
    return first, ties(record)[first]["tie"] if first else []


def _columns(record: dict[str, Any]) -> list[tuple[str, str, str, Any]]:
    """(key in the CSV, head, class, what is shown)."""
    cells, out = record["cells"], [("n", "seeds", "", lambda c: str(c["n"]))]
    if not _same(record):
        out.insert(0, ("before", "before", "", lambda c: human(c["before"])))
    if record["tuning"]:
        out.append(("learning_rate", "learning rate", "", lambda c: _rate(c)))
        if table.further(record):
            out.append(("rates_tried", "rates tried", "", lambda c: human(c["rates_tried"], "count")))
    for k in dict.fromkeys(k for c in cells for k in c["metrics"]):
        out.append((k, k.replace("_", " "), "", lambda c, k=k: human(c["metrics"].get(k))))
    if any(c["forgetting"] is not None for c in cells):
        out.append(("forgetting", "forgetting", "", lambda c: table.pm(c["forgetting"], c.get("forgetting_half"), "+")))
    for key, head, unit in (("train_seconds", "time", "seconds"), ("cpu_seconds", "CPU time", "seconds"), ("tokens_per_second", "tokens/s", "count"),
                            ("peak_memory_bytes", "peak memory", "bytes"), ("saved_bytes", "saved for backward", "bytes"),
                            ("trainable", "trained", "count"), ("adapter_bytes", "size", "bytes"), ("merge_loss", "merge loss", "number")):
        out.append((key, head, "tok" * (key == "tokens_per_second"), lambda c, key=key, unit=unit: human(c[key], unit)))
    word = {True: "pass", False: '<b class="bad">FAIL</b>', None: "—"}
    return [*out, ("verify", "verified", "", lambda c: word[c["verify"]])]


def _same(record: dict[str, Any]) -> str:
    """A sentence where all configurations start alike."""
    before = {human(c["before"]) for c in record["cells"] if c["before"] is not None}
    return f"Before training: {before.pop()} in each. " if len(before) == 1 else ""


def _rate(c: dict[str, Any]) -> str:
    edge = ' <span class="tag" title="the first or last that was tried: a wider grid might find a better one">edge</span>' * bool(c.get("rate_at_edge"))
    return "—" if c.get("learning_rate") is None else f"{c['learning_rate']:g}{edge}"


def _value(v: Any) -> str:
    return "" if v is None else str(v)


def cells_table(record: dict[str, Any]) -> str:
    """The sortable table of a comparison's cells."""
    cells, cols, (first, tied) = record["cells"], _columns(record), best(record)
    some = [c for c in cells if c["mean"] is not None and math.isfinite(c["mean"]) and c["kind"] != "none"] or [c for c in cells if c["mean"] is not None]
    low, high = (f((c["mean"] + s * (c["half"] or 0) for c in some), default=0.0) for f, s in ((min, -1), (max, 1)))
    share = f"{record['settings']['confidence'] * 100:g} %"
    heads = [("configuration", ""), (record["metric"].replace("_", " "), ""), (f"{share} interval", ""), *((h, k) for _, h, k, _ in cols)]
    out = ['<div class="scroll" role="region" tabindex="0" aria-label="Table of configurations"><table class="main"><caption><span>'
           f"{esc(table.title(record))}. {_same(record)}A head sorts by its column; tied: cannot be told from the best. "
           "The bars share one scale; an arrow is outside of it.</span></caption><thead><tr>"]
    out += [f'<th scope="col"{f""" class="{k}" """ if k else ""}><button type="button">{esc(h)}</button></th>' for h, k in heads]
    out.append("</tr></thead><tbody>")
    for c in cells:
        kind = "best" if c["cell"] == first else "tied" if c["cell"] in tied else ""
        tag = {"best": '<span class="tag">best</span>', "tied": '<span class="tag" title="cannot be told from the best">tied</span>'}.get(kind, "")
        tag += f'<span class="tag bad">{c["failed"]} failed</span>' * bool(c["failed"])
        out.append(f'<tr class="{kind}"><th scope="row" data-v="{esc(c["cell"])}">{esc(c["cell"])}{tag}</th>')
        if c["mean"] is None:
            out.append('<td data-v="">failed</td>' + '<td data-v="">—</td>' * (len(heads) - 2) + "</tr>")
            continue
        shown = charts.bar(c["mean"], c["half"], low, high) if math.isfinite(c["mean"]) else "not finite"
        out.append(f'<td data-v="{_value(c["mean"])}">{esc(table.pm(c["mean"], c["half"]))}</td><td data-v="{_value(c["mean"])}">{shown}</td>')
        out += [f'<td data-v="{_value(c["metrics"].get(k, c.get(k)))}"{f""" class="{name}" """ if name else ""}>{show(c)}</td>'
                for k, _, name, show in cols]
        out.append("</tr>")
    return "".join(out) + "</tbody></table></div>"


def _lead(record: dict[str, Any]) -> str:
    first, tied = best(record)
    if first is None:
        return "No configuration ended with a finite result."
    c = next(c for c in record["cells"] if c["cell"] == first)
    said = f"Best mean: <b>{esc(first)}</b>, {esc(record['metric'].replace('_', ' '))} {table.pm(c['mean'], c['half'])}. "
    if not any(d["p"] is not None for d in record["differences"]):
        return said + "One seed gives no interval and no test, so nothing is said about what differs."
    return said + (f"Not distinguishable from it: {esc(', '.join(tied))}." if tied else "Every other tested configuration differs from it.")


def what_differs(record: dict[str, Any]) -> str:
    """What each cell is better than, tied with, worse than; every pair."""
    rows, tested = ties(record), [d for d in record["differences"] if d["p"] is not None]
    if not tested:
        return ""
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("configuration", "is better than", "cannot be told from", "is worse than"))
    body = "".join(f'<tr><th scope="row">{esc(n)}</th>' + "".join(f"<td>{esc(', '.join(r[k])) or '—'}</td>" for k in ("better", "tie", "worse")) + "</tr>"
                   for n, r in rows.items())
    pairs = "".join(f'<tr><th scope="row">{esc(d["a"])} − {esc(d["b"])}</th><td>{esc(table.pm(d["mean"], d["half"]))}</td><td>{table._p(d["p"])}</td>'
                    f"<td>{'differ' if d['distinguishable'] else 'tie'}</td></tr>" for d in sorted(tested, key=lambda d: d["p"]))
    every = (f'<details><summary>All {len(tested)} pairs</summary><div class="scroll" role="region" tabindex="0" aria-label="All pairs">'
             '<table class="words"><caption>'
             "Mean difference with its interval, before correction; p after Holm's correction</caption><thead><tr>"
             + "".join(f'<th scope="col">{h}</th>' for h in ("pair", "difference", "p", "")) + f"</tr></thead><tbody>{pairs}</tbody></table></div></details>")
    return (f'<div class="scroll" role="region" tabindex="0" aria-label="What differs"><table class="words"><caption>What differs and what is a tie</caption>'
            f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>{every}")


def _plots(record: dict[str, Any]) -> str:
    out, name_y = "", record["metric"].replace("_", " ")
    far = _far(record["cells"])
    for word, (name, unit) in AXES.items():
        points = [{"name": c["cell"], "x": c[table.FRONTS[word]], "y": c["mean"], "half": c["half"]} for c in record["cells"]
                  if c["mean"] is not None and math.isfinite(c["mean"]) and c[table.FRONTS[word]] is not None and c["cell"] not in far]
        front = record["pareto"].get(word, [])
        if points:
            away = "".join(f" Outside of the picture: {esc(n)} ({esc(name_y)} {human(y)})." for n, y in far.items())
            out += (f'<figure>{charts.scatter(points, front, record["higher_is_better"], name, unit, name_y, f"plot-{word}")}'
                    f"<figcaption>On the front of {esc(name)}: <b>{esc(', '.join(front)) or '—'}</b>.{away}</figcaption></figure>")
    return f'<div class="plots">{out}</div>'


def _far(cells: list[dict[str, Any]]) -> dict[str, float]:
    """Untouched bases that would press all the others together: farther from them than they are apart."""
    some = [c["mean"] for c in cells if c["kind"] != "none" and c["mean"] is not None and math.isfinite(c["mean"])]
    if len(some) < 2:
        return {}
    low, high = min(some), max(some)
    return {c["cell"]: c["mean"] for c in cells if c["kind"] == "none" and c["mean"] is not None and not 2 * low - high <= c["mean"] <= 2 * high - low}


def _curves(record: dict[str, Any]) -> str:
    curves = record["curves"]
    if not curves:
        return ""
    rows = [r for c in curves.values() for k in c.values() for r in k]
    values = sorted(r[1] for r in rows)
    span = (max(r[0] for r in rows), min(r[2] for r in rows), values[min(len(values) - 1, int(0.99 * len(values)))] * 1.02, 0.0)
    return '<div class="curves">' + "".join(
        f"<figure><figcaption><b>{esc(n)}</b></figcaption>{charts.curve(n, curves, span, f'curve-{i}')}</figure>" for i, n in enumerate(curves)) + "</div>"


def facts(record: dict[str, Any]) -> str:
    """Where, when, with what it was made."""
    m, s, data = record["machine"], record["settings"], record["data"]
    budget = ", ".join(f"{v:g} {k}" for k, v in (s.get("budget") or {}).items() if v is not None) or "none: `train` says how long"
    rows = {"Date": m["date"], "Command": record["command"] or "from Python", "Base": record["base"],
            "Data": f"{data['train']}: {data['rows']:,} rows of shape {data['shape']}",
            "Held out": f"{data['eval_rows']:,} rows" + f" of {data['eval']}" * bool(data["eval"]),
            "Budget": budget, "Seeds": ", ".join(map(str, s["seeds"])), **({"Learning rates": table.tuned(record) or "as given"} if "tuning" in record else {}),
            "Machine": f"{m['cpu']}, {m['cores']} cores, {human(m['memory_bytes'], 'bytes')}, {m['system']}",
            "Device": f"{m['device']}, {'/'.join(map(str, m['threads'])) or '?'} threads a run"
            + f"; {record['jobs']} runs at a time, so times are those of a shared machine" * (record["jobs"] > 1),
            "Versions": ", ".join(f"{k} {v}" for k, v in m["versions"].items())}
    body = "".join(f'<tr><th scope="row">{k}</th><td>{esc(v)}</td></tr>' for k, v in rows.items())
    return (f'<table class="facts"><caption>How this was made</caption><tbody>{body}</tbody></table>'
            f"<pre>{esc(yaml.safe_dump(_given(s), sort_keys=False, allow_unicode=True, default_flow_style=None, width=110))}</pre>")


def _given(tree: Any) -> Any:
    """Settings without what is empty or at its default of none."""
    if isinstance(tree, dict):
        return {k: _given(v) for k, v in tree.items() if v not in (None, {}, [], False) and (k, v) != ("backend", "lorakit")}
    return [_given(v) for v in tree] if isinstance(tree, list) else tree


def _tuning(record: dict[str, Any]) -> str:
    if not record["tuning"]:
        return ""
    rates = sorted({r for t in record["tuning"] for r in t["values"]}, key=float)
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("configuration", *rates, "chosen", "time"))
    body = ""
    for t in record["tuning"]:
        chosen = f"{t['rate']:g}" if t["rate"] else "none"
        lost = {r: "—" if r not in t["values"] else "failed" if r in t["errors"] else "not finite" for r in rates}
        shown = [f"<b>{human(v)}</b>" if r == chosen else lost[r] if v is None else human(v) for r in rates for v in (t["values"].get(r),)]
        body += (f'<tr><th scope="row">{esc(t["cell"])}</th>' + "".join(f"<td>{v}</td>" for v in shown)
                 + f"<td>{chosen}{' (edge)' * t['edge']}</td><td>{human(t['seconds'], 'seconds')}</td></tr>")
    name = esc(record["metric"].replace("_", " "))
    return (f'<div class="scroll" role="region" tabindex="0" aria-label="Learning rates"><table><caption>{name} on the judging rows by '
            f"learning rate</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>")


def html(record: dict[str, Any]) -> str:
    """The whole report as one HTML text."""
    cells, metric = record["cells"], esc(record["metric"])
    lost = [f"<b>{esc(c['cell'])}</b>, {c['failed']} of {c['failed'] + c['n']} seeds: {esc(c['error'])}" for c in cells if c["failed"]]
    lost += [f"<b>{esc(t['cell'])}</b>, learning rate {esc(r)} in the tuning: {esc(why)}" for t in record["tuning"] for r, why in t["errors"].items()]
    lost += [f"<b>{esc(c['cell'])}</b>: {metric} is not finite with at least one seed, so it is neither ranked nor tested."
             for c in cells if c["mean"] is not None and not math.isfinite(c["mean"])]
    failed = "".join(f"<li>{text}</li>" for text in lost)
    share = f"{(1 - record['settings']['confidence']) * 100:.3g} %"
    parts = [
        ("Configurations", "", cells_table(record)),
        ("What differs", f"Paired by seed, two-sided t-tests, corrected for all pairs (Holm): a false difference anywhere in at most {share} of comparisons. A "
         "tie is not a proof of equality; more seeds tell more.", what_differs(record)),
        ("Failures", "", f"<ul>{failed}</ul>" if failed else ""),
        ("What it costs", "Full points are on the Pareto front: no other configuration is at least as good in both and better in one. Lines are intervals. "
         "Time is that of training steps alone.", _plots(record)),
        ("Loss", "Line and band: mean and range of the training loss over seeds; dots: held-out loss; grey: the other configurations.", _curves(record)),
        ("Learning rates", f"{esc(table.tuned(record))}. The chosen one is bold.", _tuning(record)),
        ("How it was made", "", facts(record)),
    ]
    told = f"""{len(record["cells"])} configurations × {len(record["settings"]["seeds"])} seeds on {esc(record["base"])}, {esc(record["data"]["train"])}"""
    return document(record, "comparison", told, _lead(record), parts)


def document(record: dict[str, Any], kind: str, told: str, lead: str, parts: list[tuple[str, str, str]]) -> str:
    """A page from its title, one line, what matters most, and sections of (head, note, HTML); those without HTML are left out."""
    title = esc(record["title"])
    body = "".join(f"<section><h2>{h}</h2>{f'<p class=note>{note}</p>' if note else ''}{text}</section>" for h, note, text in parts if text)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width,initial-scale=1"><style>{CSS}</style></head><body><small>lorakit {kind} ·
{esc(record["machine"]["date"])}</small><h1>{title}</h1><p>{told}</p><p class="lead">{lead}</p>{body}<script>{SCRIPT}</script></body></html>
"""
