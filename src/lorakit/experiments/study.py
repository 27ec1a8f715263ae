"""The search's memory: an optuna study in a SQLite file, which several processes share, and what it is asked and told."""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, extra
from lorakit.experiments.config import METRICS
from lorakit.experiments.locks import claimed, turn
from lorakit.experiments.runs import changes
from lorakit.experiments.search import FOLDER, Tune
from lorakit.experiments.space import fingerprint

FILE, NAME = "study.db", "lorakit"
STARTUP, COMPARED = 6, 4  # trials before the sampler learns, and before the median stops
GIVE_UP = 10  # failures in a row


def library() -> Any:
    """optuna, quiet. LorakitError naming the extra where it is not installed."""
    try:
        import optuna as o
    except ImportError as e:
        raise extra("optuna", "tune") from e
    o.logging.set_verbosity(o.logging.ERROR)
    return o


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """LorakitError where the file of the study cannot be read or written."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, library().exceptions.StorageInternalError) as e:
        why = str(e.__cause__ or e).splitlines()[0]
        raise LorakitError(f"{folder / FILE}: {why}; mend: room on the disk and the right to write there, or another `output`") from e


@dataclass
class Draw:
    """A trial to run. `begun`: how often, 1 where no process died over it; `seen`: the evaluations that it was let pass then; `last`: its last one's value."""

    number: int
    params: dict[str, Any]
    default: bool
    begun: int
    seen: frozenset[int]
    trial: Any
    last: float = 0.0


class Study:
    """The study of a search. Every method that changes it holds the folder's turn."""

    def __init__(self, t: Tune, metric: str, settings: dict[str, Any]):
        o = self.o = library()
        self.worker = uuid.uuid4().hex[:8]
        self.t, self.higher, self.first = t, METRICS[metric], t.space.default(t.default.run)
        kinds = {"median": lambda: o.pruners.MedianPruner(n_startup_trials=COMPARED), "none": o.pruners.NopPruner,
                 "halving": lambda: o.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)}
        with turn(t.output):
            storage = o.storages.RDBStorage(f"sqlite:///{(t.output / FILE).resolve()}", engine_kwargs={"connect_args": {"timeout": 120}})
            self.study = o.create_study(storage=storage, study_name=NAME, direction="maximize" if self.higher else "minimize",
                                        pruner=kinds[t.search.early_stopping](), load_if_exists=True)
            was = self.study.user_attrs.get("settings")
            if was is not None and was != settings:
                raise LorakitError(f"{t.output} holds a search made with other settings: {changes(was, settings)}; mend: another `output`")
            if was is None:
                self.study.enqueue_trial(t.space.within(self.first), user_attrs={"default": True})
                self.study.set_user_attr("settings", settings)

    def rows(self) -> list[dict[str, Any]]:
        """Every trial as plain data, the repeats left out."""
        return [_row(f) for f in self.study.get_trials(deepcopy=False) if f.state.name != "WAITING" and "repeats" not in f.user_attrs]

    def why_not(self, rows: list[dict[str, Any]], failures: int) -> str:
        """Why no further trial is begun; empty where one may be."""
        s = self.t.search
        if s.trials is not None and len(rows) >= s.trials:
            return f"{s.trials} trials"
        if failures >= GIVE_UP:
            return f"{failures} failures in a row"
        left = self.t.space.left([r["params"] for r in rows])
        if rows and left == []:
            return "every configuration of the space was tried"
        for unit, most in (s.budget.model_dump(exclude_none=True) if s.budget else {}).items():
            each = expected(self.t, rows, unit)
            used = sum(r[unit] if r["state"] != "running" else each for r in rows)
            if used + each > most or used >= most:
                return f"the budget of {most:g} {unit}"
        return ""

    @contextmanager
    def next(self, failures: int) -> Iterator[tuple[Draw | None, str, list[int]]]:
        """(a trial that this process has until the block ends, why there is none, what others are running)."""
        with ExitStack() as held:
            with turn(self.t.output):
                got, why, running = self._next(failures, held)
            yield got, why, running

    def _next(self, failures: int, held: ExitStack) -> tuple[Draw | None, str, list[int]]:
        running = []
        for f in self.study.get_trials(deepcopy=False, states=(self.o.trial.TrialState.RUNNING,)):
            if held.enter_context(claimed(self._claim(f.number))):  # whoever began it is gone
                return self._draw(self.o.trial.Trial(self.study, f._trial_id), frozenset(f.intermediate_values)), "", running
            running.append(f.number)
        rows = self.rows()
        if why := self.why_not(rows, failures):
            return None, why, running
        while True:
            drawn = len(self.study.get_trials(deepcopy=False))  # so a search that goes on draws what it would have drawn
            chance = random.Random(f"{self.t.search.seed} {drawn}")  # seeds in a row would draw alike
            self.study.sampler = self._sampler(chance.getrandbits(32))
            draw = self._draw(self.study.ask())
            same = next((r["number"] for r in rows if fingerprint(r["params"]) == fingerprint(draw.params)), None)
            if same is None:
                held.enter_context(claimed(self._claim(draw.number)))
                return draw, "", running
            draw.trial.set_user_attr("repeats", same)
            self.study.tell(draw.trial, state=self.o.trial.TrialState.FAIL)
            if left := self.t.space.left([r["params"] for r in rows]):
                self.study.enqueue_trial(self.t.space.within(chance.choice(left)))

    def _sampler(self, seed: int) -> Any:
        kinds = {"tpe": lambda: self.o.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, constant_liar=True),
                 "random": lambda: self.o.samplers.RandomSampler(seed=seed)}
        return kinds[self.t.search.sampler]()

    def _draw(self, trial: Any, seen: frozenset[int] = frozenset()) -> Draw:
        default, begun = bool(trial.user_attrs.get("default")), trial.user_attrs.get("drawn", {}).get("begun", 0) + 1
        params = self.first if default else self.t.space.draw(trial)
        for key in self.t.space.within(params) if default else ():
            self.t.space.axes[key].draw(trial, key)  # as it was enqueued
        trial.set_user_attr("drawn", {"params": params, "begun": begun})
        return Draw(trial.number, params, default, begun, seen, trial)

    def _claim(self, number: int) -> Path:
        return self.t.output / FOLDER / f"{number:04}.worker"

    def stops(self, draw: Draw, n: int, value: float) -> bool:
        """Keeps the value of the n-th evaluation and says whether the trial is to stop. The default never is: it is what the others are compared with."""
        draw.last = value
        if n in draw.seen:
            return False
        draw.trial.report(value, n)
        lags = draw.trial.should_prune()  # also asked of the default: halving keeps the values that it was asked about
        return (lags or not math.isfinite(value)) and not draw.default and self.t.search.early_stopping != "none"

    def tell(self, draw: Draw, state: str, value: float | None, about: dict[str, Any]) -> None:
        """How it ended: complete, stopped, diverged, failed. What diverged counts as worse than all others, what failed as nothing."""
        states = self.o.trial.TrialState
        kinds = {"complete": states.COMPLETE, "stopped": states.PRUNED, "diverged": states.PRUNED, "failed": states.FAIL}
        draw.trial.set_user_attr("result", {"state": state, "worker": self.worker} | about)
        with turn(self.t.output):
            self.study.tell(draw.trial, value if state == "complete" else None, state=kinds[state])

    def importance(self) -> dict[str, float]:
        """Parameter -> its share of what decides the metric (PED-ANOVA, arXiv 2304.10255); empty where too few trials tell."""
        o, states = self.o, self.o.trial.TrialState
        some = [f for f in self.study.get_trials(deepcopy=True, states=(states.COMPLETE,)) if f.params]
        if len(some) < 8:
            return {}
        study = o.create_study(direction=self.study.direction.name.lower())
        study.add_trials(some)
        try:
            return o.importance.get_param_importances(study, evaluator=o.importance.PedAnovaImportanceEvaluator())
        except (ValueError, RuntimeError):
            return {}


def _row(f: Any) -> dict[str, Any]:
    drawn, result = f.user_attrs.get("drawn", {}), f.user_attrs.get("result", {}) if f.state.is_finished() else {}
    state = result.get("state", "running")
    return {"number": f.number, "state": state, "default": bool(f.user_attrs.get("default")), "params": drawn.get("params", {}),
            "value": f.value if state == "complete" else None, "course": [[n, v] for n, v in sorted(f.intermediate_values.items())],
            "steps": result.get("steps", 0), "tokens": result.get("tokens", 0), "seconds": result.get("seconds", 0.0), "error": result.get("error"),
            "begun": drawn.get("begun", 1), "worker": result.get("worker"), "metrics": result.get("metrics", {})}


def expected(t: Tune, rows: list[dict[str, Any]], unit: str) -> float:
    """What one whole trial costs: what its budget says, else the dearest until now."""
    known = t.default.budget.get(unit)
    return known if known is not None else max((r[unit] for r in rows if r["state"] == "complete"), default=0.0)
