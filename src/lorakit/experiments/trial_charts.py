"""Pictures of a search: the best so far, the trials over one parameter, how they came to their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lorakit.experiments.charts import Box, Scale, esc, frame
from lorakit.training.report import human

WIDE, HIGH = 620.0, 320.0
INSIDE: Box = (62.0, 22.0, 606.0, 274.0)


def _open(title: str, about: str, key: str) -> str:
    return (f'<svg class="plot" viewBox="0 0 {WIDE:g} {HIGH:g}" role="img" aria-labelledby="{key}-t {key}-d"><title id="{key}-t">{esc(title)}</title>'
            f'<desc id="{key}-d">{esc(about)}</desc>')


def _scale(values: Sequence[float]) -> Scale:
    return Scale(values, INSIDE[3] - 4, INSIDE[1] + 4)


def limits(rows: Sequence[dict[str, Any]], higher: bool) -> tuple[float, float]:
    """The values that a picture shows: from the best to those not several times farther from it than the middle one."""
    some = sorted((v for r in rows if (v := reached(r)) is not None), reverse=higher)
    if not some:
        return 0.0, 1.0
    edge = some[0] + 4 * (some[len(some) // 2] - some[0])
    last = max((v for v in some if (v >= edge if higher else v <= edge)), key=lambda v: abs(v - some[0]))
    return min(some[0], last), max(some[0], last)


def reached(row: dict[str, Any]) -> float | None:
    """A trial's value, or where it was when it was stopped; None where neither is finite."""
    v = row["value"] if row["value"] is not None else row["course"][-1][1] if row["course"] else None
    return v if v is not None and math.isfinite(v) else None


def _dot(row: dict[str, Any], x: float, y: float, what: str) -> str:
    return (f'<circle class="{"on" if row["state"] == "complete" else "off"}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>trial {row["number"]}: {esc(what)}'
            f'{"" if row["state"] == "complete" else ", " + row["state"]}</title></circle>')


def progress(rows: Sequence[dict[str, Any]], metric: str, higher: bool) -> str:
    """Every trial in its order, and the best until then as steps."""
    low, high = limits(rows, higher)
    sx, sy = Scale([r["number"] for r in rows], INSIDE[0] + 8, INSIDE[2], several=math.inf), _scale([low, high])
    best, line, dots = None, "", []
    for r in rows:
        if (v := reached(r)) is None:
            continue
        x, y = sx(r["number"]), sy(min(max(v, low), high))
        dots.append(_dot(r, x, y, human(v)))
        if r["state"] == "complete" and (best is None or (v > best if higher else v < best)):
            line += f"M{x:.1f} {y:.1f}" if best is None else f"H{x:.1f}V{y:.1f}"
            best = v
    line += f"H{INSIDE[2]:.1f}" if line else ""
    return (_open("Best so far", f"{len(dots)} trials; the best reached {human(best)}.", "progress") + "".join(frame(sx, sy, INSIDE, "trial", metric, higher))
            + f'<path class="front" d="{line}"/>' * bool(line) + "".join(dots) + "</svg>")


def cloud(rows: Sequence[dict[str, Any]], axis: dict[str, Any], metric: str, higher: bool) -> str:
    """The trials over a number that was searched."""
    some = [(r, r["params"][axis["key"]], v) for r in rows if axis["key"] in r["params"] and (v := reached(r)) is not None]
    low, high = limits(rows, higher)
    sx, sy = Scale([x for _, x, _ in some], INSIDE[0] + 8, INSIDE[2], several=0.0 if axis["log"] else math.inf), _scale([low, high])
    dots = [_dot(r, sx(x), sy(min(max(v, low), high)), f"{human(v)} at {x:g}") for r, x, v in some]
    name = axis["name"]
    return (_open(f"{metric} over {name}", f"{len(some)} trials.", f"cloud-{name}") + "".join(frame(sx, sy, INSIDE, name, metric, higher))
            + "".join(dots) + "</svg>")


def strip(rows: Sequence[dict[str, Any]], low: float, high: float) -> str:
    """The trials of one choice on the scale of all."""
    wide, pad = 150.0, 6.0
    out = f'<svg class="strip" viewBox="0 0 {wide:g} 16" role="img"><title>{len(rows)} trials</title><line class="axis" x1="0" x2="{wide:g}" y1="8" y2="8"/>'
    for r in rows:
        if (v := reached(r)) is not None:
            out += _dot(r, pad + (min(max(v, low), high) - low) / ((high - low) or 1) * (wide - 2 * pad), 8, human(v))
    return out + "</svg>"


def courses(rows: Sequence[dict[str, Any]], best: int, metric: str, higher: bool) -> str:
    """The value at each evaluation: grey what was stopped or was not the best, the best in colour."""
    some = [r for r in rows if len(r["course"]) and all(math.isfinite(v) for _, v in r["course"])]
    low, high = limits([{"value": v, "course": []} for r in some for _, v in r["course"]], higher)
    last = max((n for r in some for n, _ in r["course"]), default=1)
    sx, sy = Scale([1, last], INSIDE[0] + 8, INSIDE[2], several=math.inf), _scale([low, high])
    out = []
    for r in sorted(some, key=lambda r: r["number"] == best):
        at = [(sx(n), sy(min(max(v, low), high))) for n, v in r["course"]]
        out.append(f'<path class="{"mine" if r["number"] == best else "other"}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in at)}"/>')
        if r["state"] == "stopped":
            out.append(_dot(r, *at[-1], human(r["course"][-1][1])))
    return (_open("Evaluations", f"{len(some)} trials; trial {best} is the best.", "courses") + "".join(frame(sx, sy, INSIDE, "evaluation", metric, higher))
            + "".join(out) + "</svg>")
