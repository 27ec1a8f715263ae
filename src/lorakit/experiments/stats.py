"""What several seeds allow to say: means with intervals, paired differences, Holm's correction, ties, Pareto fronts.

Numbers in, numbers out; nothing here knows what was run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lorakit.errors import LorakitError, extra


def _student():
    try:
        from scipy.stats import t
    except ImportError as e:
        raise extra("scipy", "train") from e
    return t


@dataclass(frozen=True)
class Mean:
    """A mean over seeds; `half` is half the width of its interval, None where one seed cannot give one."""

    mean: float
    half: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """`a` minus `b` over their common seeds. `p` is corrected for all pairs (Holm); None where two seeds are not there."""

    a: str
    b: str
    mean: float
    half: float | None
    n: int
    p: float | None = None
    distinguishable: bool = False


def mean(values: Sequence[float], confidence: float = 0.95) -> Mean:
    """The mean and Student's interval. LorakitError without values."""
    if not len(values):
        raise LorakitError("a mean needs at least one value")
    x = np.asarray(values, float)
    n = len(x)
    if n == 1:
        return Mean(float(x[0]), None, 1)
    if x.min() == x.max():
        return Mean(float(x[0]), 0.0, n)  # rounding would leave a trace of a spread
    half = _student().ppf(0.5 + confidence / 2, n - 1) * x.std(ddof=1) / math.sqrt(n)
    return Mean(float(x.mean()), float(half), n)


def paired(a: Mapping[int, float], b: Mapping[int, float], confidence: float = 0.95) -> tuple[Mean, float | None]:
    """Mean of a − b over the seeds both have, and the p-value of its being zero (two-sided t-test); None below two seeds."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return Mean(math.nan, None, 0), None
    x = np.array([a[s] - b[s] for s in seeds], float)
    m = mean(x, confidence)
    if m.n == 1 or not np.isfinite(x).all():
        return m, None
    error = x.std(ddof=1) / math.sqrt(m.n)
    if error == 0:
        return m, 1.0 if m.mean == 0 else 0.0
    return m, float(2 * _student().sf(abs(m.mean) / error, m.n - 1))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order given: all of them below α together keep the chance of any false one below α."""
    out, top = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        top = max(top, min(1.0, p[i] * (len(p) - rank)))
        out[i] = top
    return out


def differences(cells: Mapping[str, Mapping[int, float]], confidence: float = 0.95) -> list[Difference]:
    """Every pair of cells, {name: {seed: value}}: what differs, corrected over all pairs that can be tested; the rest are ties."""
    rows = [(a, b, *paired(cells[a], cells[b], confidence)) for a, b in combinations(cells, 2)]
    corrected = iter(holm([p for *_, p in rows if p is not None]))
    out = []
    for a, b, m, raw in rows:
        p = None if raw is None else next(corrected)
        out.append(Difference(a, b, m.mean, m.half, m.n, p, p is not None and p < 1 - confidence))
    return out


def pareto(points: Mapping[str, tuple[float, ...]], higher: Sequence[bool]) -> list[str]:
    """Names that no other one beats: at least as good in everything and better in something. `higher`: per axis, whether more is better.

    Points with a value that is not finite are left out.
    """
    sign = np.where(np.asarray(higher), -1.0, 1.0)
    good = {k: np.asarray(v, float) * sign for k, v in points.items() if np.isfinite(v).all()}
    return [k for k, v in good.items() if not any((o <= v).all() and (o < v).any() for o in good.values())]
