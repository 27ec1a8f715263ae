"""Weights found by trying: adapters on one model, a loss to be small, no gradients.

    lorahub   argmin over w of  loss(W + Σ w_t ΔW_t) + λ · mean |w_t|,  |w_t| ≤ bound, from 0, by CMA-ES.   LoRAHub, arXiv 2307.13269
    scan      the loss at W + w ΔW for each w of a grid: how strongly one adapter acts.                     ControlPE, arXiv 2311.09773

Trying a w is one assignment and the loss: nothing is merged. The sum is the exact one; the LoRAHub authors' code weighs A and B both,
which brings in products of different adapters and the square of w.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from lorakit import host
from lorakit.errors import LorakitError, extra

Loss = Callable[[nn.Module], float]
GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Found:
    """What a search tried and took. loss: without the penalty; before: of the base alone."""

    weights: list[float]
    loss: float
    before: float
    tried: list[tuple[list[float], float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def _trying(model: nn.Module, names: Sequence[str], loss: Loss) -> Iterator[Callable[[Sequence[float]], float]]:
    """Inside, the loss as a function of the weights; after, what was active is so again."""
    state = host.known(model, names)
    kept = state.active, state.chained, state.rows

    def at(weights: Sequence[float]) -> float:
        state.active = {n: float(w) for n, w in zip(names, weights, strict=True) if w}
        return float(loss(model))

    state.chained, state.rows = False, None
    try:
        yield at
    finally:
        state.active, state.chained, state.rows = kept


def scan(model: nn.Module, names: Sequence[str], loss: Loss, grid: Sequence[float] = GRID) -> Found:
    """The best weight of one adapter on a grid; all of them, with their losses, are in `tried`."""
    if len(names) != 1:
        raise LorakitError(f"scan goes over the weight of one adapter, not of {len(names)}; mend: search lorahub")
    with _trying(host.bare(model), names, loss) as at:
        tried = [([float(w)], at([w])) for w in dict.fromkeys(grid)]
        before = next((v for (w,), v in tried if not w), None)
        weights, value = min(tried, key=lambda t: t[1])
        return Found(weights, value, at([0.0]) if before is None else before, tried)


def lorahub(model: nn.Module, names: Sequence[str], loss: Loss, budget: int = 40, bound: float = 1.5, penalty: float = 0.05, seed: int = 42) -> Found:
    """The best weights found within a budget of evaluations. Two adapters at least; the point without any is tried first."""
    if len(names) < 2:
        raise LorakitError("lorahub weighs two adapters at least; mend: search scan")
    if budget < 2 or bound <= 0 or penalty < 0:
        raise LorakitError(f"lorahub: a budget of 2 at least, a bound above 0 and a penalty of 0 at least, not {budget}, {bound:g}, {penalty:g}")
    try:
        import cma
    except ImportError as e:
        raise extra("cma", "tune") from e
    n = len(names)
    with _trying(host.bare(model), names, loss) as at:
        tried = [([0.0] * n, at([0.0] * n))]
        es = cma.CMAEvolutionStrategy([0.0] * n, bound / 3, {"bounds": [-bound, bound], "seed": seed, "verbose": -9, "maxfevals": budget - 1})
        while len(tried) < budget and not es.stop():
            some = [list(map(float, w)) for w in es.ask()]
            values = []
            for w in some[: budget - len(tried)]:
                tried.append((w, at(w)))
                values.append(_penalised(tried[-1], penalty))
            if len(values) < len(some):
                break
            es.tell(some, values)
        weights, value = min(tried, key=lambda t: _penalised(t, penalty))
    return Found(weights, value, tried[0][1], tried)


def _penalised(tried: tuple[list[float], float], penalty: float) -> float:
    weights, value = tried
    return value + penalty * sum(map(abs, weights)) / len(weights)


SEARCHES = {"lorahub": lorahub, "scan": scan}
