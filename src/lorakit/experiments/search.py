"""The configuration of a search: what `lorakit train` takes, which is the default, and what may differ from it, within which budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from lorakit.errors import LorakitError, near
from lorakit.experiments import config as k
from lorakit.experiments.config import Budget, Judged, Trial
from lorakit.experiments.space import METHOD, WHOLE, Space, axis, canonical, takes, word
from lorakit.hooks.base import build
from lorakit.recipes import ALIASES, compose
from lorakit.training import config as c
from lorakit.training.config import Part, Run

FOLDER = "trials"


class Search(Part):
    """What is varied, how often, and when to stop."""

    space: dict[str, Any] = Field(..., description="adapter.KEY, train.KEY or hooks -> a list of values, or {low: …, high: …, log: true}")
    trials: int | None = Field(None, ge=1, description="how many configurations are tried, the default among them")
    budget: Budget | None = Field(None, description="of all trials together")
    early_stopping: Literal["median", "halving", "none"] = Field("median", description="median: below the median of the others at the same evaluation; "
                                                                 "halving: not in the better half at each doubling")
    sampler: Literal["tpe", "random"] = Field("tpe", description="tree-structured Parzen estimator, or by chance")
    seed: int = Field(1000, ge=0, description="of the trials, of the draws, and of the rows that judge; none of `seeds`")
    fraction: float = Field(0.1, gt=0, lt=1, description="share of the training rows that judges and does not train")

    @model_validator(mode="after")
    def _end(self) -> Search:
        if not self.space:
            raise ValueError("the space is empty; mend: space: {learning_rate: {low: 1e-4, high: 1e-2, log: true}}")
        if self.trials is None and self.budget is None:
            raise ValueError("give `trials`, or a `budget` of all trials together, or both")
        return self


class Settings(Judged):
    """The keys that a search has beside those of a run."""

    search: Search = Field(..., description="what is varied and how often")
    whole_budget: bool = Field(False, description="train the default also with all that the search and a run of its answer cost")
    output: str = Field("runs/search", description="folder of the search")


@dataclass(frozen=True)
class Tune:
    """A checked search."""

    settings: Settings
    space: Space
    default: Trial  # trial 0, on the rows of the file

    @property
    def output(self) -> Path:
        return Path(self.settings.output)

    @property
    def search(self) -> Search:
        return self.settings.search

    def trial(self, number: int, params: Mapping[str, Any]) -> Trial:
        """The run of a draw. LorakitError where there is no such configuration."""
        return _trial(self.settings, self.space.apply(params), number, f"trial {number}")

    def final(self, cell: str, params: Mapping[str, Any], seed: int, budget: Budget | None, extra: tuple[str, ...] = ()) -> Trial:
        """One of the runs that tell whether the answer is better: all training rows, the held-out rows, a seed the search did not have."""
        run = k.a_run(self.space.apply(params), seed, budget, self.output / "final" / cell / f"seed-{seed}", cell)
        return Trial(cell, seed, run, "lorakit", k.amount(budget), extra=extra)


def _trial(s: Settings, settings: Mapping[str, Any], number: int, where: str) -> Trial:
    run = k.a_run(settings, s.search.seed, s.budget, Path(s.output) / FOLDER / f"{number:04}", where)
    return Trial("search", s.search.seed, run, "lorakit", k.amount(s.budget), extra=(s.metric,) if s.metric in k.EXTRA else (), number=number)


def parse(raw: Mapping[str, Any], where: str = "configuration") -> Tune:
    """A checked search from plain data. LorakitError naming every wrong key or value, before anything is run."""
    s, shared = k.grouped(raw, Settings, where)
    k._no_fixed(shared.get("train", {}), f"{where}: train", ("seed",))
    if s.search.seed in s.seeds:
        raise LorakitError(f"{where}: search: the seed {s.search.seed} is one of `seeds`, so that what is chosen would be judged by its own luck; "
                           "mend: another")
    if isinstance(shared.get("adapter"), Mapping):
        shared["adapter"] = _plain(shared["adapter"])
    default = _trial(s, shared, 0, where)
    space = Space(_axes(s.search.space, f"{where}: search.space"), shared)
    _check(space, default.run, f"{where}: search.space")
    per, whole = k.amount(s.budget), k.amount(s.search.budget)
    for unit in per.keys() & whole.keys():
        if whole[unit] < per[unit]:
            raise LorakitError(f"{where}: search.budget: {whole[unit]:g} {unit} do not hold one trial of {per[unit]:g}; mend: a larger one")
    stops = s.search.early_stopping != "none"
    if stops and s.metric in k.EXTRA:
        raise LorakitError(f"{where}: {s.metric} is measured at the end of a run alone, so nothing can be stopped early by it; "
                           "mend: search: {early_stopping: none}, or another metric")
    if stops and "seconds" in per and not default.run.train.eval_steps:
        raise LorakitError(f"{where}: with a budget of seconds nobody knows when a run is to be looked at; mend: train: {{eval_steps: 20}}, "
                           "or search: {early_stopping: none}")
    return Tune(s, space, default)


def _plain(adapter: Any) -> Any:
    """An adapter's options in their one spelling."""
    adapter = {"method": adapter} if isinstance(adapter, str) else adapter
    return {ALIASES.get(o, o): v for o, v in adapter.items()} if isinstance(adapter, Mapping) else adapter


def _axes(space: Mapping[str, Any], where: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in space.items():
        key = canonical(name, where)
        if key in out:
            raise LorakitError(f"{where}: `{name}` is {key}, which stands there twice")
        k._no_fixed({key.removeprefix("train."): 0} if key.startswith("train.") else {}, where, ("seed", "max_steps", "epochs"))
        if key == "train":
            raise LorakitError(f"{where}: `train` is a group of settings; mend: train.learning_rate, …")
        out[key] = axis([_plain(v) for v in value] if key == WHOLE and isinstance(value, list) else value, f"{where}.{name}")
        if key in (WHOLE, METHOD, "hooks") and not hasattr(out[key], "values"):
            raise LorakitError(f"{where}.{name}: a list of values, no range")
    first = [key for key in (WHOLE, METHOD) if key in out]
    return {key: out[key] for key in [*first, *(key for key in out if key not in first)]}


def _check(space: Space, default: Run, where: str) -> None:
    """Every value by itself makes a configuration; an option is one that some method of the search has."""
    adapters = [default.adapter, *(space.axes[WHOLE].values if WHOLE in space.axes else ())]
    for a in adapters:
        if not isinstance(a, Mapping):
            raise LorakitError(f"{where}.adapter: a method or {{method: …}} with its options, not {a!r}")
    methods = [*(a.get("method", "lora") for a in adapters), *(space.axes[METHOD].values if METHOD in space.axes else ())]
    for key, a in space.axes.items():
        top, _, option = key.partition(".")
        if top == "adapter" and option and key != METHOD:
            if not any(takes(m, option, a.samples()) for m in methods):
                _told(where, lambda option=option, a=a: compose(methods[0], **{option: a.samples()[0]}))
            continue
        for value in a.samples():
            if key == "hooks":
                _told(f"{where}.hooks: {word(value)}", lambda value=value: [build(h) for h in (value if isinstance(value, list) else [value])])
            _told(where, lambda key=key, value=value: c.parse(space.apply({key: value}), where))


def _told(where: str, make: Any) -> None:
    try:
        make()
    except LorakitError as e:
        text = str(e)
        raise LorakitError(text if text.startswith(where) else f"{where}: {text}") from None


def read(path: str | Path, sets: Sequence[str] = ()) -> Tune:
    """A search from a YAML file and `key=value` words: those of `lorakit train`, and search.trials=30, seeds=5, …"""
    raw, own = c.read_yaml(path), list(Settings.model_fields)
    mine, rest = {x: v for x, v in raw.items() if x in own}, {x: v for x, v in raw.items() if x not in own}
    for text in sets:
        key, eq, value = text.partition("=")
        top = (key := key.strip()).partition(".")[0]
        if not eq:
            raise LorakitError(f"--set takes key=value, not {text!r}")
        if top in own:
            c._put(mine, key, c.number(yaml.safe_load(value)))
        elif top in c.Run.model_fields or key in c.FLAT:
            rest = c._grouped(rest)
            c._set(rest, key, c.number(yaml.safe_load(value)))
        else:
            raise LorakitError(f"--set: unknown key `{key}`{near(top, [*own, *k.SHARED, *c.FLAT])}")
    return parse(mine | rest, str(path))
