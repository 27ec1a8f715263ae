"""Pictures as SVG text: an interval in a row of the table, a scatter plot with its Pareto front, a loss curve. Colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from lorakit.training.report import human

Box = tuple[float, float, float, float]  # left, top, right, bottom
LETTER, LINE = 6.6, 14.0  # width and height of a letter of a label, a little more than it takes


def esc(text: Any) -> str:
    return escape(str(text))


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Round numbers from low to high, about n of them."""
    if not high > low:
        return [low]
    raw = (high - low) / n
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


class Scale:
    """Values to places. Logarithmic where the largest is several times the smallest; zeros far from the rest stand at the beginning, apart."""

    def __init__(self, values: Iterable[float], start: float, end: float, pad: float = 0.06, unit: str = "number", several: float = 4.0):
        some = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
        good = [v for v in some if v > 0]
        self.log = bool(good) and min(some) >= 0 and max(good) / min(good) > several
        self.zeros = bool(good) and 0 in some and min(some) == 0 and (self.log or min(good) > 0.2 * max(good))
        self.start, self.unit = start, unit
        self.begin = start + (end - start) * (0.08 if self.zeros else 0.0)
        some = good if self.zeros else some
        low, high = (math.log(min(good)), math.log(max(good))) if self.log else (min(some), max(some))
        gap = (high - low) * pad or abs(high) * 0.1 or 1.0
        self.low, self.high, self.end = low - gap, high + gap, end

    def __call__(self, v: float) -> float:
        if v <= 0 and (self.log or self.zeros):
            return self.start
        x = math.log(v) if self.log else v
        return self.begin + (x - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self, n: int = 5) -> list[tuple[float, str]]:
        if not self.log:
            step = 1024 ** max(0, math.floor(math.log(max(abs(self.high), 1), 1024))) if self.unit == "bytes" else 1
            inside = [t * step for t in ticks(self.low / step, self.high / step, n)]
            return [(self.start, "0")] * self.zeros + [(self(t), self.word(t)) for t in inside if t > 0 or not self.zeros]
        decades = [m * 10.0**k for k in range(math.floor(self.low / math.log(10)), math.ceil(self.high / math.log(10)) + 1) for m in (1, 2, 5)]
        if self.unit == "bytes":
            decades = [2.0**k for k in range(max(0, math.floor(self.low / math.log(2))), math.ceil(self.high / math.log(2)) + 1)]
        inside = [t for t in decades if self.low <= math.log(t) <= self.high]
        inside = inside[:: -(-len(inside) // n) or 1]
        return [(self.start, "0")] * self.zeros + [(self(t), self.word(t)) for t in inside]

    def word(self, v: float) -> str:
        text = human(v, self.unit)
        return f"{v:g}" if self.unit == "number" else text.replace(".00 ", " ").replace(".0 ", " ")


def bar(mean: float, half: float | None, low: float, high: float) -> str:
    """The interval of one row on the scale of the column: a line, a dot at the mean, an arrow where it leaves the scale."""
    wide, pad = 120.0, 6.0

    def at(v: float) -> float:
        return pad + (min(max(v, low), high) - low) / ((high - low) or 1) * (wide - 2 * pad)

    told = human(mean) + (f" ± {human(half)}" if half is not None else "")
    out = f'<svg class="bar" viewBox="0 0 {wide:g} 16" role="img"><title>{told}</title><line class="axis" x1="0" x2="{wide:g}" y1="8" y2="8"/>'
    if not low <= mean <= high:
        x, to = (wide - 2, -6) if mean > high else (2, 6)
        return out + f'<path class="dot" d="M{x:g} 8l{to} -4v8z"/></svg>'
    if half is not None:
        out += f'<line class="span" x1="{at(mean - half):.1f}" x2="{at(mean + half):.1f}" y1="8" y2="8"/>'
    return out + f'<circle class="dot" cx="{at(mean):.1f}" cy="8" r="3.5"/></svg>'


def place(points: Sequence[tuple[float, float, str]], inside: Box, radius: float = 5.0) -> list[tuple[float, float, bool]]:
    """Where each label stands (its left end and the middle of its height) and whether it needs a line to its point.

    Labels keep off points and other labels where there is room within `inside`; the fullest neighbourhoods choose first.
    """
    boxes: list[Box] = [(x - radius, y - radius, x + radius, y + radius) for x, y, _ in points]
    out: list[tuple[float, float, bool]] = [(0.0, 0.0, False)] * len(points)
    near = [sum(math.hypot(x - a, (y - b) * 3) < 120 for a, b, _ in points) for x, y, _ in points]
    for n in sorted(range(len(points)), key=lambda i: -near[i]):
        x, y, text = points[n]
        wide, best = len(text) * LETTER, None
        for ring in range(9):
            d = radius + 4 + ring * 11
            spots = [(x + d, y), (x - d - wide, y), (x - wide / 2, y - d - 4), (x - wide / 2, y + d + 4), (x + d * 0.7, y - d * 0.8),
                     (x + d * 0.7, y + d * 0.8), (x - d * 0.7 - wide, y - d * 0.8), (x - d * 0.7 - wide, y + d * 0.8)]
            for a, b in spots:
                box = (a, b - LINE / 2, a + wide, b + LINE / 2)
                out_of = max(0.0, inside[0] - box[0]) + max(0.0, box[2] - inside[2]) + max(0.0, inside[1] - box[1]) + max(0.0, box[3] - inside[3])
                cost = sum(map(lambda other, box=box: _over(box, other), boxes)) + 200 * out_of + 3 * ring
                if best is None or cost < best[0]:
                    best = (cost, a, b, ring > 1, box)
            if best[0] <= 3 * ring:
                break
        _, a, b, line, box = best
        out[n] = (a, b, line)
        boxes.append(box)
    return out


def _over(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def frame(sx: Scale, sy: Scale, inside: Box, x_name: str, y_name: str, higher: bool) -> list[str]:
    """Grid, ticks and names of a plot."""
    left, top, right, bottom = inside
    out = [f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:g}" y2="{bottom:g}"/><text x="{x:.1f}" y="{bottom + 17:g}" '
           f'text-anchor="middle">{esc(word)}</text>' for x, word in sx.ticks(6)]
    out += [f'<line class="grid" x1="{left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/><text x="{left - 8:g}" y="{y + 4:.1f}" '
            f'text-anchor="end">{esc(word)}</text>' for y, word in sy.ticks()]
    out.append(f'<text class="name" x="{right:g}" y="{bottom + 38:g}" text-anchor="end">{esc(x_name)}{" (logarithmic)" * sx.log} →</text>')
    out.append(f'<text class="name" x="{left:g}" y="{top - 4:g}">{esc(y_name)}{" (logarithmic)" * sy.log}, {"higher" if higher else "lower"} is better</text>')
    return out


def scatter(points: Sequence[dict[str, Any]], front: Sequence[str], higher: bool, x_name: str, x_unit: str, y_name: str, key: str) -> str:
    """`points`: {name, x, y, half}. The front is drawn as steps; its points are full, the others hollow."""
    wide, high, left, bottom, top, right = 620.0, 380.0, 62.0, 46.0, 16.0, 14.0
    shown = [p for p in points if math.isfinite(p["x"]) and math.isfinite(p["y"])]
    sx = Scale([p["x"] for p in shown], left + 8, wide - right, unit=x_unit)
    sy = Scale([v for p in shown for v in (p["y"] - (p["half"] or 0), p["y"] + (p["half"] or 0)) if v > 0 or p["y"] <= 0], high - bottom, top)
    out = [f'<svg class="plot" viewBox="0 0 {wide:g} {high:g}" role="img" aria-labelledby="{key}-t {key}-d"><title id="{key}-t">{esc(y_name)} against '
           f'{esc(x_name)}</title><desc id="{key}-d">{len(shown)} configurations. On the Pareto front: {esc(", ".join(front) or "none")}.</desc>']
    out += frame(sx, sy, (left, top, wide - right, high - bottom), x_name, y_name, higher)
    at = [(sx(p["x"]), sy(p["y"])) for p in shown]
    line = sorted((q for p, q in zip(shown, at, strict=True) if p["name"] in front), key=lambda q: q[0])
    if len(line) > 1:
        steps = f"M{line[0][0]:.1f} {line[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in line[1:])
        out.append(f'<path class="front" d="{steps}"/>')
    labels = place([(x, y, p["name"]) for p, (x, y) in zip(shown, at, strict=True)], (left + 2, top, wide - 2, high - bottom))
    for p, (x, y), (a, b, far) in zip(shown, at, labels, strict=True):
        on = p["name"] in front
        if p["half"] and math.isfinite(p["half"]):
            ends = [min(max(sy(max(v, 1e-12)), top), high - bottom) for v in (p["y"] - p["half"], p["y"] + p["half"])]
            out.append(f'<line class="span" x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>')
        if far:
            edge = min(max(x, a), a + len(p["name"]) * LETTER)
            out.append(f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{edge:.1f}" y2="{b:.1f}"/>')
        out.append(f'<circle class="{"on" if on else "off"}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{esc(p["name"])}: {human(p["y"])}, '
                   f'{human(p["x"], x_unit)}</title></circle><text class="{"on" if on else "off"}" x="{a:.1f}" y="{b + 4:.1f}">{esc(p["name"])}</text>')
    return "".join(out) + "</svg>"


def curve(name: str, curves: dict[str, dict[str, list]], span: tuple[float, float, float, float], key: str) -> str:
    """The loss of one configuration, the others in grey behind it. `span`: last step, lowest, highest loss, 0."""
    wide, high, left, bottom, top = 300.0, 170.0, 38.0, 22.0, 8.0
    last, low, most, _ = span

    def sx(step: float) -> float:
        return left + step / (last or 1) * (wide - left - 8)

    def sy(v: float) -> float:
        return top + (most - min(max(v, low), most)) / ((most - low) or 1) * (high - top - bottom)

    mine = curves[name]
    names = {"loss": "training", "eval_loss": "held-out"}
    ends = [f"{word} loss {human(mine[k][-1][1])} after {mine[k][-1][0]:g} steps" for k, word in names.items() if mine.get(k)]
    out = [f'<svg class="curve" viewBox="0 0 {wide:g} {high:g}" role="img" aria-labelledby="{key}-t {key}-d"><title id="{key}-t">Loss of {esc(name)}</title>'
           f'<desc id="{key}-d">{esc("; ".join(ends))}; mean and range over seeds.</desc>']
    for v in ticks(low, most, 4):
        out.append(f'<line class="grid" x1="{left:g}" x2="{wide - 8:g}" y1="{sy(v):.1f}" y2="{sy(v):.1f}"/><text x="{left - 6:g}" y="{sy(v) + 4:.1f}" '
                   f'text-anchor="end">{v:g}</text>')
    for v in [t for t in ticks(0, last, 4) if t == int(t)]:
        out.append(f'<text x="{sx(v):.1f}" y="{high - 6:g}" text-anchor="middle">{v:g}</text>')

    def path(rows: list) -> str:
        return "M" + "L".join(f"{sx(r[0]):.1f} {sy(r[1]):.1f}" for r in rows)

    out += [f'<path class="other" d="{path(c["loss"])}"/>' for n, c in curves.items() if n != name and c.get("loss")]
    if rows := mine.get("loss"):
        there = [f"{sx(r[0]):.1f} {sy(r[3]):.1f}" for r in rows] + [f"{sx(r[0]):.1f} {sy(r[2]):.1f}" for r in reversed(rows)]
        out.append(f'<path class="band" d="M{"L".join(there)}Z"/><path class="mine" d="{path(rows)}"/>')
    for r in mine.get("eval_loss", ()):
        out.append(f'<line class="span" x1="{sx(r[0]):.1f}" x2="{sx(r[0]):.1f}" y1="{sy(r[2]):.1f}" y2="{sy(r[3]):.1f}"/>'
                   f'<circle class="eval" cx="{sx(r[0]):.1f}" cy="{sy(r[1]):.1f}" r="2.6"/>')
    return "".join(out) + "</svg>"
