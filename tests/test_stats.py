"""The statistics of a comparison against known distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as reference

from lorakit.errors import LorakitError
from lorakit.experiments import stats


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_interval_covers_as_often_as_it_says(n):
    rng = np.random.default_rng(n)
    hits = 0
    for x in rng.normal(3.0, 2.0, (4000, n)):
        m = stats.mean(x)
        hits += abs(m.mean - 3.0) <= m.half
    assert 0.93 <= hits / 4000 <= 0.97


def test_another_confidence_covers_that_often():
    rng = np.random.default_rng(7)
    draws = [stats.mean(x, 0.8) for x in rng.normal(0, 1, (4000, 4))]
    assert 0.78 <= np.mean([abs(m.mean) <= m.half for m in draws]) <= 0.82


def test_one_seed_has_no_interval_and_none_is_refused():
    assert stats.mean([2.5]) == stats.Mean(2.5, None, 1)
    (d,) = stats.differences({"a": {0: 1.0}, "b": {0: 2.0}})
    assert (d.mean, d.half, d.n, d.p, d.distinguishable) == (-1.0, None, 1, None, False)
    with pytest.raises(LorakitError, match="at least one"):
        stats.mean([])


def _cells(rng, shifts, n=5, shared=1.0):
    """Cells over the same seeds: a part of the noise is the seed's own, which pairing takes out."""
    seed = rng.normal(0, shared, n)
    return {f"c{i}": dict(enumerate(seed + shift + rng.normal(0, 1, n))) for i, shift in enumerate(shifts)}


def test_equal_configurations_come_out_as_ties():
    """Six cells without a difference, fifteen pairs: a false one in less than a tenth of the draws."""
    rng = np.random.default_rng(1)
    false = sum(any(d.distinguishable for d in stats.differences(_cells(rng, [0.0] * 6))) for _ in range(400))
    assert false / 400 <= 0.1
    two = sum(stats.differences(_cells(rng, [0.0, 0.0]))[0].distinguishable for _ in range(2000))
    assert 0.03 <= two / 2000 <= 0.07, "the uncorrected error of one pair is its nominal one"


def test_a_real_difference_is_found():
    rng = np.random.default_rng(2)
    found = sum(stats.differences(_cells(rng, [0.0, 3.0], n=8))[0].distinguishable for _ in range(500))
    assert found / 500 > 0.95
    among = 0
    for _ in range(200):
        hit = {frozenset((d.a, d.b)) for d in stats.differences(_cells(rng, [0.0, 0.0, 3.0], n=8)) if d.distinguishable}
        among += {frozenset(("c0", "c2")), frozenset(("c1", "c2"))} <= hit
    assert among / 200 > 0.8


def test_pairing_takes_out_what_the_seeds_share():
    rng = np.random.default_rng(3)
    found = sum(stats.differences(_cells(rng, [0.0, 3.0], n=8, shared=100.0))[0].distinguishable for _ in range(200))
    assert found / 200 > 0.95


def test_paired_differences_equal_scipys():
    rng = np.random.default_rng(4)
    a, b = rng.normal(0, 1, 6), rng.normal(0.5, 1, 6)
    m, p = stats.paired(dict(enumerate(a)), {**dict(enumerate(b)), 99: 1e9})
    want = reference.ttest_rel(a, b)
    low, high = want.confidence_interval(0.95)
    assert m.n == 6 and math.isclose(p, want.pvalue)
    assert math.isclose(m.mean - m.half, low) and math.isclose(m.mean + m.half, high)


def test_equal_numbers_tie_and_constant_steps_differ():
    same, up = {0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5}
    assert not stats.differences({"a": same, "b": dict(same)})[0].distinguishable
    assert stats.differences({"a": same, "b": up})[0].distinguishable
    assert stats.differences({"a": {0: 1.0}, "b": {1: 1.0}})[0].n == 0, "no common seed"
    assert stats.differences({"a": {0: math.nan, 1: 1.0}, "b": same})[0].p is None, "a run that diverged cannot be tested"


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.6, 0.9]) == [1.0, 1.0] and stats.holm([]) == []


def test_pareto_front_by_brute_force():
    rng = np.random.default_rng(5)
    for _ in range(200):
        points = {str(i): tuple(map(float, v)) for i, v in enumerate(rng.integers(0, 6, (12, 2)))}  # ties happen

        def beaten(k, points=points):
            x, y = points[k]
            return any(a >= x and b <= y and (a > x or b < y) for a, b in points.values())

        assert stats.pareto(points, (True, False)) == [k for k in points if not beaten(k)]
    assert stats.pareto({"a": (math.nan, 1.0), "b": (5.0, 5.0)}, (False, False)) == ["b"]
