"""What a run leaves to look at: the loss curve, one self-contained page, a summary for the terminal.

All read the dict saved as `run.json`, say so where a part is missing or not finite, and load nothing from outside.
"""

from __future__ import annotations

import io
import json
import math
import re
from base64 import b64encode
from html import escape
from pathlib import Path
from typing import Any

from lorakit.errors import extra
from lorakit.formats.files import writing

LOWER = re.compile(r"loss|perplexity|ppl|nll|error|bits")
HIGHER = re.compile(r"exact|match|accuracy|(^|_)acc(_|$)|(^|_)f1|bleu|rouge|reward|margin|win_rate")
SCALES = {"bytes": (1024, ("B", "KiB", "MiB", "GiB", "TiB")), "count": (1000, ("", "k", "M", "B", "T"))}
PICTURES = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {0x7F: 0x2421}  # what shows a control character
SHOWN, LONGEST = 20, 8000  # samples on the page, characters of one text


def _real(x: Any) -> float | None:
    try:
        return None if isinstance(x, bool) else float(x)
    except (TypeError, ValueError, OverflowError):
        return None


def _finite(x: Any) -> float | None:
    return v if (v := _real(x)) is not None and math.isfinite(v) else None


def human(x: Any, kind: str = "number") -> str:
    """A figure at a glance: bytes '775 MiB', count '4.48 M', seconds '1 min 1 s', share '2.20 %', number '3.021'."""
    if (v := _real(x)) is None or not math.isfinite(v):
        return "—" if v is None else "NaN" if math.isnan(v) else "∞" if v > 0 else "−∞"
    a, text = abs(v), f"{v:.1f} s" if abs(v) >= 0.9995 else f"{v * 1000:.0f} ms"
    if kind == "count" and a < 1e5:
        text = f"{v:,.{0 if a >= 10 or v == int(v) else 1}f}"
    elif kind in SCALES:
        base, units = SCALES[kind]
        for unit in units:
            digits = 0 if unit == units[0] or a >= 99.95 else 1 if a >= 9.995 else 2
            text = f"{math.copysign(a, v):,.{digits}f} {unit}".strip()
            if round(a, digits) < base:
                break
            a /= base
    elif kind == "seconds" and a >= 59.95:
        n, k, *unit = (1, 60, "min", "s") if a < 3599.5 else (60, 60, "h", "min") if a < 86370 else (3600, 24, "d", "h")
        text = f"{round(v / n) // k:,} {unit[0]} {round(v / n) % k} {unit[1]}"
    elif kind == "share":
        text = f"{v:.{1 if a >= 0.09995 or not a else 2 if a >= 0.000995 else 4}%}".replace("%", " %")
    elif kind == "number":
        text = f"{v:,.{3 if a < 100 else 1 if a < 1e4 else 0}f}"
        text = re.sub(r"e\+?(-?)0*", r"e\1", f"{v:.1e}") if 0 < a < 1e-3 or a >= 1e9 else text
    return text.replace("-", "−")


def _get(d: Any, key: str, kind: type = dict) -> Any:
    v = d.get(key) if isinstance(d, dict) else None
    return kind() if not isinstance(v, kind) else [r for r in v if isinstance(r, dict)] if kind is list else v


def _series(history: Any, key: str) -> list[tuple[float, float]]:
    found = [(_finite(r.get("step")), i, _real(r.get(key))) for i, r in enumerate(_get({"": history}, "", list), 1)]
    return sorted(((i if s is None else s, v) for s, i, v in found if v is not None), key=lambda p: p[0])


def _text(x: Any) -> str:
    s = x if isinstance(x, str) else json.dumps(x, ensure_ascii=False, default=str, indent=2)
    s = s.replace("\r\n", "\n").translate(PICTURES).encode("utf-8", "replace").decode()
    return s if len(s) <= LONGEST else f"{s[:LONGEST]} … ({len(s) - LONGEST:,} more characters)"


def _esc(x: Any) -> str:
    return escape(_text(x))


def _metrics(run: dict) -> list[tuple[str, ...]]:
    """Rows of label, before, after, change and verdict ('better', 'worse', 'not finite' or '')."""
    before, after = (_get(_get(run, "metrics"), k) for k in ("before", "after"))
    rows = []
    for name in dict.fromkeys([*after, *before]):
        raw = (before.get(name), after.get(name))
        (b, a), lower, higher = map(_finite, raw), LOWER.search(name), HIGHER.search(name)
        share = higher and not re.search("reward|margin", name) and all(v is None or 0 <= v <= 1 for v in (b, a))
        change, verdict = "—", "not finite" if _real(raw[1]) is not None and a is None else ""
        if a is not None and b is not None:
            change = f"{(a - b) * 100:.1f} points".replace("-", "−") if share else human(a - b)
            change += f" ({human((a - b) / abs(b), 'share')})" if b and not share else ""
            change = "no change" if a == b else ("+" + change).replace("(", "(+") if a > b else change
            verdict = "" if a == b or not (lower or higher) else "better" if (a < b) == bool(lower) else "worse"
        show = [_text(v) if isinstance(v, str) else human(v, "share" if share else "number") for v in raw]
        rows.append((name.replace("eval_", "evaluation_").replace("_", " ").capitalize(), *show, change, verdict))
    return rows


def _notices(run: dict) -> list[str]:
    out, evals = [], _series(run.get("history"), "eval_loss")
    for points, what in ((_series(run.get("history"), "loss"), "training"), (evals, "evaluation")):
        if bad := [s for s, v in points if not math.isfinite(v)]:
            out.append(f"{len(bad)} of {len(points)} {what} losses are not finite, the first at step {bad[0]:,.0f}.")
    good = [p for p in evals if math.isfinite(p[1])]
    if good and (best := min(good, key=lambda p: p[1]))[1] < good[-1][1] * 0.99:
        out.append(f"Evaluation loss was lowest ({human(best[1])}) at step {best[0]:,.0f}; last: {human(good[-1][1])}.")
    out += [f"{m[0]} is {m[4]} after training: {m[1]} → {m[2]}." for m in _metrics(run) if m[4] not in ("", "better")]
    shares = [v for m in _get(run, "modules", list) if (v := _real(m.get("share"))) is not None]
    for n, what in ((shares.count(0), "did not change"), (sum(not math.isfinite(s) for s in shares), "are not finite")):
        out += [f"{n} of {len(shares)} adapted modules {what}."] * bool(n)
    return out + ["The saved adapter failed its verification."] * (_facts(run)["Verification"][0] == "FAIL")


def _facts(run: dict) -> dict[str, tuple[str, str]]:
    """What the page and the terminal both tell: name -> (the figure, the rest)."""
    def f(key: str, how: str = "", unit: str = "") -> str:
        v = _get(run, key.split(".")[0]).get(key.split(".")[1])
        return "" if v in (None, "") else (human(v, how) if how else _text(v)) + (unit.rstrip("s") if v == 1 else unit)

    whole, some = _finite(_get(run, "base").get("parameters")), _finite(_get(run, "adapter").get("trainable"))
    points, ok = _get(_get(run, "verify"), "points", list), _get(run, "verify").get("ok")
    state = "" if ok is None and not points else "FAIL" if False in (ok, *(p.get("ok") for p in points)) else "PASS"
    passed = f"{sum(p.get('ok') is True for p in points)} of {len(points)} checks passed" if points else ""
    return {name: (v[0] or "not recorded", " · ".join(filter(None, v[1:]))) for name, v in {
        "Base": (f("base.name"), f("base.parameters", "count", " parameters")),
        "Adapter": (f("adapter.summary") or f("adapter.method"),),
        "Trained": (human(some / whole, "share") if whole and some is not None else "",
                    f("adapter.trainable", "count", f" of {human(whole, 'count')} parameters")),
        "Data": (f("data.train"), f("data.rows", "count", " rows"), f("data.tokens", "count", " tokens"),
                 f("data.trained_tokens", "count", " trained"), f("data.eval_rows", "count", " evaluation rows")),
        "Time": (f("cost.train_seconds", "seconds"), f("cost.steps", "count", " steps"),
                 f("cost.tokens_per_second", "count", " tokens/s")),
        "Peak memory": (f("cost.peak_memory_bytes", "bytes"), f("cost.device"), f("cost.threads", "count", " threads")),
        "Saved at": (f("adapter.path"), f("adapter.bytes", "bytes")),
        "Verification": (state, passed),
    }.items()}


def loss_figure(history: list[dict], before: float | None = None) -> Any:
    """A matplotlib Figure: each logged loss thin, a smoothed line, evaluations as dots, `before` dashed."""
    try:
        import numpy as np
        from matplotlib.figure import Figure  # without pyplot: a PNG is drawn by Agg, whatever backend is set
    except ImportError as e:
        raise extra("matplotlib", "train") from e
    accent, ink, muted, alarm, labels = "#0f6e6e", "#1c2526", "#66757a", "#b3261e", []
    fig = Figure(figsize=(9, 3.5), dpi=200, facecolor="white")
    ax = fig.add_axes((0.055, 0.125, 0.79, 0.78))
    train, evals = (np.array(_series(history, k), float).reshape(-1, 2) for k in ("loss", "eval_loss"))
    if bad := [p[0] for p in (*train, *evals) if not math.isfinite(p[1])]:
        ax.plot(bad, [0.03] * len(bad), "x", color=alarm, ms=5, transform=ax.get_xaxis_transform(), clip_on=False)
        ax.text(min(bad), 0.075, "not finite", color=alarm, transform=ax.get_xaxis_transform())
    if len(t := train[np.isfinite(train[:, 1])]):
        k, many = np.bartlett(2 * max(2, len(t) // 25) + 1), len(t) >= 30  # fewer points are shown as they are
        smooth = np.convolve(t[:, 1], k, "same") / np.convolve(np.ones(len(t)), k, "same") if many else t[:, 1]
        ax.plot(*train.T, color=accent, lw=0.7, alpha=0.4 * many)
        ax.plot(t[:, 0], smooth, color=accent, lw=1.9, marker="o" if len(t) == 1 else None, ms=4)
        labels.append((smooth[-1], f"train {human(smooth[-1])}", accent))
    if len(fine := evals[np.isfinite(evals[:, 1]), 1]):
        ax.plot(*evals.T, color=ink, lw=0.8, marker="o", ms=5, mec="white", mew=0.8)
        labels.append((fine[-1], f"eval {human(fine[-1])}", ink))
    if (start := _finite(before)) is not None:
        ax.axhline(start, color=muted, lw=1, ls=(0, (4, 3)))
        labels.append((start, f"eval before {human(start)}", muted))
    (low, high), y = ax.get_ylim(), -math.inf
    for value, text, color in sorted(labels):  # each at the height of its line, at least a line of text above the last
        y = max(value, y + 0.075 * (high - low))
        ax.text(1.012, y, text, color=color, transform=ax.get_yaxis_transform(), va="center", fontsize=10)
    ax.set_ylim(low, max(high, y))
    ax.text(0.5, 0.5, "" if labels else "no finite loss was recorded", color=muted, transform=ax.transAxes, ha="center")
    ax.locator_params(axis="x", nbins=8, integer=True)
    ax.tick_params(length=0, labelsize=9.5, labelcolor=muted, labelleft=bool(labels), labelbottom=bool(labels))
    ax.grid(axis="y", color="#e3e8e8", lw=0.7 * bool(labels))
    ax.spines[["top", "left", "right"]].set_visible(False)
    for x, y, word in ((-0.045, 1.04, "loss"), (1.012, -0.058, "step")):
        ax.text(x, y, word, color=muted, transform=ax.transAxes, fontsize=9.5)
    return fig


def _bars(modules: list[dict]) -> str:
    """A panel for each kind of module, a bar for each module in the order of the layers, one scale for all."""
    kinds, out = {}, ""
    for m in (m for m in modules if "share" in m):
        words = _text(m.get("name", "?")).split(".")
        kind = ".".join([w for w in words if not w.isdecimal()][-2:])  # without the numbers of the layer, of an expert
        n, tip = next(filter(str.isdecimal, words), ""), f"{m.get('name')}: {human(m['share'], 'share')}"
        kinds.setdefault(kind, []).append((int(n or -1), _finite(m["share"]) or 0.0, f"{tip}, rank {m.get('rank')}"))
    top, columns = max([g[1] for k in kinds.values() for g in k] or [0]) or 1, max([6, *map(len, kinds.values())])
    for kind, rows in kinds.items():
        rows.sort(key=lambda g: g[0])
        bars = "".join(f'<rect x="{i}.1" width=".8" y="{60 - 60 * v / top:.2f}" height="{60 * v / top:.2f}"><title>'
                       f"{_esc(tip)}</title></rect>" for i, (_, v, tip) in enumerate(rows))
        span = " to ".join(str(n) for n in dict.fromkeys((rows[0][0], rows[-1][0])) if n >= 0)
        out += (f"<figure><figcaption>{escape(kind)}<span>max {human(max(g[1] for g in rows), 'share')}</span>"
                f'</figcaption><svg viewBox="0 0 {columns} 60" preserveAspectRatio="none">{bars}</svg>'
                f"<small>{f'layer {span}' * bool(span)}</small></figure>")
    return f'<div class="grid">{out}</div>' * bool(out)


CSS = """:root{color-scheme:light dark;--bg:#fff;--ink:#1c2526;--mut:#5b696e;--line:#dde4e4;--soft:#f3f6f6;
--acc:#0f6e6e;--mark:#d5ebe8;--bad:#b3261e}@media screen and (prefers-color-scheme:dark){:root{--bg:#14191a;
--ink:#e4eaea;--mut:#98a6aa;--line:#2b3436;--soft:#1b2223;--acc:#5fc3bd;--mark:#1d4644;--bad:#ff8f85}.chart{
filter:invert(1) hue-rotate(180deg);mix-blend-mode:screen}}*{box-sizing:border-box}body{margin:0 auto;max-width:960px;
padding:48px 32px 64px;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",Roboto,Arial,sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}p,h1,h2,h3,figure{margin:0}small,.note,h3,th,figcaption,pre{
font-size:13px;color:var(--mut);font-weight:400;text-align:left}h1{font-size:30px;line-height:1.25;margin:2px 0 4px}
h1+p{margin-bottom:26px}h2{font-size:17px}h1,h2,strong,b{font-weight:600}b,td span{white-space:nowrap}section{
margin-top:34px;padding-top:18px;border-top:1px solid var(--line)}.note{margin:2px 0 14px}.PASS,.better{
color:var(--acc)}.FAIL,.worse,.finite{color:var(--bad)}.grid{display:grid;gap:20px 28px;margin:12px 0 24px;
grid-template-columns:repeat(auto-fit,minmax(195px,1fr))}.tile{border-top:2px solid var(--acc);padding-top:10px}strong{
display:block;font-size:20px;line-height:1.4}ul{margin:28px 0 0;padding:12px 18px;list-style:none;
background:var(--soft);border-left:3px solid var(--bad)}.chart{display:block;width:100%}table{border-collapse:collapse;
width:100%}td,th{padding:6px 20px 6px 0;vertical-align:top;border-bottom:1px solid var(--line)}.num :is(td,
th):nth-child(n+2){text-align:right}.num :last-child{padding-right:0}.kv td:first-child{color:var(--mut);width:24%}
tr:last-child td{border:0}figcaption{color:var(--ink);display:flex;justify-content:space-between}svg{width:100%;
height:64px;display:block;fill:var(--acc);border-bottom:1px solid var(--mut)}article,figure,tr,.grid,.box{
break-inside:avoid}pre{margin:2px 0 0;color:var(--ink);white-space:pre-wrap;max-height:360px;overflow:auto;
font-family:ui-monospace,Menlo,Consolas,monospace}.box{background:var(--soft);padding:10px 14px}.two{columns:2;
max-height:none}ul:empty{display:none}.after{border-left:2px solid var(--acc);padding-left:12px}mark{
background:var(--mark);color:inherit;border-bottom:1.5px solid var(--acc)}@media print{@page{margin:16mm}body{padding:0;
font-size:10.5pt;print-color-adjust:exact}pre{max-height:none}h2,.note{break-after:avoid}h1+p+.grid{gap:16px;
grid-template-columns:repeat(4,1fr)}}.num{overflow-wrap:normal}"""


def html(run: dict, loss_png: bytes) -> str:
    """The whole report as one HTML text, with the picture `loss_png` inside it."""
    def table(kind: str, rows: Any, head: str = "") -> str:  # the cells are HTML already
        body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in r)}</tr>" for r in rows)
        return f'<table class="{kind}">{head}{body}</table>' * bool(body)

    facts, metrics, alerts = _facts(run), _metrics(run), "".join(f"<li>{_esc(n)}</li>" for n in _notices(run))
    bars, samples, config = _bars(_get(run, "modules", list)), _get(run, "samples", list), _get(run, "config")
    trend, state = [human(v) for _, v in _series(run.get("history"), "loss")] or ["—"], facts["Verification"][0]
    m = metrics[0] if metrics else ("Training loss", trend[0], trend[-1], "")
    title, said = _esc(run.get("title") or "Training run"), {k: " · ".join(filter(None, v)) for k, v in facts.items()}
    shown = "".join(
        f'<article><h3>Prompt</h3><pre class="box" dir="auto">{_esc(s.get("prompt", "—"))}</pre><div class="grid">'
        + "".join(f'<div class="{k}"><h3>{k.capitalize()}</h3><pre dir="auto">{_esc(s[k])}</pre></div>'
                  for k in ("before", "after", "expected") if s.get(k) is not None) + "</div></article>"
        for s in samples[:SHOWN])
    data = re.sub(r"⟦(.*?)(?:⟧|\Z)", r"<mark>\1</mark>", _esc(_get(run, "data").get("preview") or ""), flags=re.S)
    word = {"True": "<b class=PASS>pass</b>", "False": "<b class=FAIL>FAIL</b>"}
    parts = [
        ("Loss", "No training loss was recorded." if trend == ["—"] else
         "Thin: each logged training loss; thick: smoothed. Dots: evaluation; dashed: before training.",
         f'<img class="chart" alt="Training loss from {trend[0]} to {trend[-1]}" '
         f'src="data:image/png;base64,{b64encode(loss_png).decode()}">'),
        ("Metrics", "On the evaluation data." if metrics else "No evaluation was made.",
         table("num", ((*map(_esc, m[:4]), f'<span class="{m[4]}">{m[4]}</span>') for m in metrics),
               "<tr><th>Metric<th>Before<th>After<th>Change<th></tr>")),
        ("Samples", f"{len(samples[:SHOWN])} of {len(samples)} shown." if samples else "No samples were taken.", shown),
        ("Learned change", "Each change relative to its weight, ‖ΔW‖ / ‖W‖. A bar for each layer, one scale for all."
         if bars else "The change of the modules was not measured.", bars),
        ("Data", _esc(said["Data"]), f'<pre class="box" dir="auto">{data}</pre>' * bool(data)),
        ("Verification", said["Verification"], table("kv", (
            (_esc(q.get("name", "?")), word.get(str(q.get("ok")), "skipped"), _esc(q.get("detail") or ""))
            for q in _get(run.get("verify"), "points", list)))),
        ("Setup", "", table("kv", (map(_esc, i) for i in (said | _get(run, "versions")).items()))),
        ("Configuration", "Not recorded." * (not config), f'<pre class="box two">{_esc(config)}</pre>' * bool(config)),
    ]
    tiles = "".join(
        f'<div class="tile"><h3>{_esc(a)}</h3><strong>{_esc(b)}</strong><small>{_esc(c)}</small></div>' for a, b, c in (
            (m[0], f"{m[1]} → {m[2]}", m[3]), *((k, *facts[k]) for k in ("Trained", "Time", "Peak memory"))))
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><style>{CSS}</style></head><body><small>lorakit training report ·
{_esc(run.get("date") or "date not recorded")} · verification <b class="{state}">{state}</b></small><h1>{title}</h1>
<p>{_esc(facts["Adapter"][0])} · base {_esc(facts["Base"][0])}</p><div class="grid">{tiles}</div><ul>{alerts}</ul>
{"".join(f'<section><h2>{t}</h2><p class=note>{note}</p>{body}</section>' for t, note, body in parts)}</body></html>"""


def write_report(run: dict, folder: Path) -> dict[str, Path]:
    """Writes `loss.png` and `report.html` into `folder`, both or neither; returns {"loss": path, "report": path}."""
    png, before = io.BytesIO(), _get(_get(run, "metrics"), "before").get("eval_loss")
    loss_figure(_get(run, "history", list), before).savefig(png, format="png")
    with writing(folder) as w:
        w.path("loss.png").write_bytes(png.getvalue())
        w.text("report.html", html(run, png.getvalue()))
    return {"loss": Path(folder) / "loss.png", "report": Path(folder) / "report.html"}


def summary(run: dict) -> Any:
    """The run for the terminal: a rich Group of facts, metrics before and after, and what must not be overlooked."""
    from rich.console import Group
    from rich.table import Column, Table
    from rich.text import Text

    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, (figure, rest) in _facts(run).items():
        facts.add_row(Text(name, "dim"), Text(figure, "bold red" * (figure == "FAIL")) + Text(f"  {rest}", "dim"))
    grid = Table("", *(Column(c, justify="right") for c in ("before", "after", "change")), "", box=None, pad_edge=False)
    for m in _metrics(run):
        grid.add_row(*map(Text, m))
    return Group(Text(_text(run.get("title") or "Training run"), "bold"), facts, *[grid] * bool(grid.rows),
                 *(Text(f"! {n}", "red") for n in _notices(run)))
