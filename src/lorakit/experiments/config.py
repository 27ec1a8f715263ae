"""The configuration of a comparison: what `lorakit train` takes, and cells, a grid, seeds, a budget."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from lorakit.errors import LorakitError, near
from lorakit.training import config as c
from lorakit.training.config import Part, Run

METRICS = {"eval_loss": False, "perplexity": False, "accuracy": True, "exact_match": True, "preference_accuracy": True}  # name -> higher is better
SHARED = ("base", "task", "data", "train", "eval", "hooks", "adapter")
VARIED = ("adapter", "train", "hooks")  # data and base are the same in every cell
FIXED = {"seed": "seeds", "max_steps": "budget", "epochs": "budget"}


class Budget(Part):
    """What every cell may use for training; exactly one of them."""

    tokens: int | None = Field(None, ge=1, description="tokens without padding; the last step may go over by less than a batch")
    steps: int | None = Field(None, ge=1, description="optimiser steps")
    seconds: float | None = Field(None, gt=0, description="seconds inside training steps, evaluation not counted")

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("give exactly one of tokens, steps, seconds")
        return self


class Cell(Part):
    """One configuration of the list."""

    name: str | None = Field(None, pattern=r"^\w[\w.,+=-]*$", description="also the name of its folder; by default its method's name")
    adapter: dict[str, Any] | str | None = Field(None, description="method and options, as for lorakit train")
    train: dict[str, Any] = Field({}, description="settings of `train` that differ in this cell")
    hooks: list[str | dict[str, Any]] | None = Field(None, description="in place of the hooks of all cells")
    base: bool = Field(False, description="true: the untouched base, measured and not trained")

    @model_validator(mode="after")
    def _what(self) -> Cell:
        if self.base and (self.adapter is not None or self.train or self.hooks):
            raise ValueError("base: true is the untouched base and takes no adapter, train or hooks")
        if not self.base and self.adapter is None:
            raise ValueError("needs an adapter, or base: true")
        return self

    def label(self) -> str:
        named = self.adapter if isinstance(self.adapter, str) else (self.adapter or {}).get("method", "lora")
        return self.name or ("base" if self.base else str(named))


class Settings(Part):
    """The keys that a comparison has beside those of a run."""

    seeds: int | list[int] = Field(3, description="how many, or which")
    budget: Budget | None = Field(None, description="without it, `train` says how long")
    metric: str | None = Field(None, description="what is compared; by default accuracy, else exact match, else loss")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of intervals and of what counts as a difference")
    cells: list[Cell] = Field([], description="named configurations")
    grid: dict[str, list[Any]] = Field({}, description="adapter.KEY or train.KEY -> values; every combination is a cell")
    output: str = Field("runs/comparison", description="folder of the comparison")

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, v: int | list[int]) -> list[int]:
        if isinstance(v, int):
            if v < 1:
                raise ValueError("there must be at least one seed")
            return list(range(v))
        if not v or min(v) < 0 or len(set(v)) < len(v):
            raise ValueError("seeds are different whole numbers, 0 or more, at least one of them")
        return v


@dataclass(frozen=True)
class Trial:
    """One cell with one seed, ready to run."""

    cell: str
    seed: int
    run: Run
    untouched: bool
    budget: dict[str, float]

    @property
    def folder(self) -> Path:
        return Path(self.run.output)

    def settings(self) -> dict[str, Any]:
        """All that decides its result, flat; the place where it is kept does not."""
        run = self.run.model_dump(mode="json")
        run.pop("output")
        return _flat(run) | {"untouched": self.untouched} | _flat({"budget": self.budget})


@dataclass(frozen=True)
class Compare:
    """A checked comparison."""

    settings: Settings
    trials: list[Trial]

    @property
    def output(self) -> Path:
        return Path(self.settings.output)

    @property
    def cells(self) -> list[str]:
        return list(dict.fromkeys(t.cell for t in self.trials))


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for k, v in tree.items():
        out |= _flat(v, f"{above}{k}.") if isinstance(v, Mapping) and v else {f"{above}{k}": v}
    return out


def _explain(e: ValidationError, where: str) -> str:
    lines = []
    for err in e.errors():
        place = ".".join(map(str, err["loc"]))
        if err["type"] == "extra_forbidden":
            part = {"budget": Budget, "cells": Cell}.get(str(err["loc"][0]), Settings)
            lines.append(f"unknown key `{place}`{near(str(err['loc'][-1]), part.model_fields)}")
        else:
            told = err["msg"].removeprefix("Value error, ")
            lines.append(f"`{place}`: {told[0].lower()}{told[1:]}" + (f", not {err['input']!r}" if not isinstance(err["input"], (dict, list)) else ""))
    return f"{where}: " + "; ".join(dict.fromkeys(lines))


def parse(raw: Mapping[str, Any], where: str = "configuration") -> Compare:
    """A checked comparison from plain data. LorakitError naming every wrong key or value, before anything is run."""
    known = [*Settings.model_fields, *SHARED]
    for k in raw:
        if k not in known and k not in c.FLAT:
            raise LorakitError(f"{where}: unknown key `{k}`{near(k, [*known, *c.FLAT])}")
    try:
        s = Settings.model_validate({k: v for k, v in raw.items() if k in Settings.model_fields})
    except ValidationError as e:
        raise LorakitError(_explain(e, where)) from None
    if s.metric is not None and s.metric not in METRICS:
        raise LorakitError(f"{where}: unknown metric `{s.metric}`{near(s.metric, METRICS)}")
    shared = c._grouped({k: v for k, v in raw.items() if k not in Settings.model_fields})
    if s.budget:
        _no_fixed(shared.get("train", {}), f"{where}: train", ("max_steps", "epochs"))
    _no_fixed(shared.get("train", {}), f"{where}: train", ("seed",))
    rows = [(cell.label(), _of_cell(shared, cell, f"{where}: cell `{cell.label()}`", bool(s.budget)), cell.base) for cell in s.cells]
    rows += _of_grid(shared, s, where)
    if not rows:
        raise LorakitError(f"{where}: nothing to compare; mend: give `cells` or `grid`")
    names = [name for name, *_ in rows]
    for name in names:
        if names.count(name) > 1:
            raise LorakitError(f"{where}: {names.count(name)} cells are called `{name}`; mend: give each its own `name`")
    trials = []
    for name, settings, untouched in rows:
        for seed in s.seeds:
            one = copy.deepcopy(settings)
            one["train"] = {**one.get("train", {}), "seed": seed, **_length(s.budget)}
            one["output"] = str(Path(s.output) / name / f"seed-{seed}")
            run = c.parse(one, f"{where}: cell `{name}`")
            if s.budget and s.budget.seconds and run.train.lr_scheduler_type != "constant":
                raise LorakitError(f"{where}: cell `{name}`: with a budget of seconds nobody knows where a falling learning rate would end; "
                                   "mend: train: {lr_scheduler_type: constant}, or a budget of tokens or steps")
            trials.append(Trial(name, seed, run, untouched, s.budget.model_dump(exclude_none=True) if s.budget else {}))
    return Compare(s, trials)


def _length(budget: Budget | None) -> dict[str, int]:
    if budget is None:
        return {}
    return {"max_steps": budget.steps or (10**9 if budget.seconds else 1)}  # for tokens, the steps are counted when the data is read


def _no_fixed(train: Mapping[str, Any], where: str, keys: tuple[str, ...]) -> None:
    for k in keys:
        if k in train:
            raise LorakitError(f"{where}.{k}: a comparison takes this from `{FIXED[k]}`; mend: leave it out")


def _of_cell(shared: Mapping[str, Any], cell: Cell, where: str, budget: bool) -> dict[str, Any]:
    _no_fixed(cell.train, f"{where}: train", tuple(FIXED) if budget else ("seed",))
    out = {**shared, "train": {**shared.get("train", {}), **cell.train}, "adapter": cell.adapter or {"method": "lora"}}
    return out if cell.hooks is None else {**out, "hooks": cell.hooks}


def _of_grid(shared: Mapping[str, Any], s: Settings, where: str) -> list[tuple[str, dict[str, Any], bool]]:
    """Every combination, named by its values: `dora-r8`, `lora-r8-learning_rate0.001`."""
    if not s.grid:
        return []
    keys = []
    for k, values in s.grid.items():
        key = k if "." in k or k in VARIED else c.FLAT.get(k, k)
        if key.partition(".")[0] not in VARIED:
            raise LorakitError(f"{where}: grid: unknown key `{k}`{near(k, [*VARIED, *(f for f, to in c.FLAT.items() if to.partition('.')[0] in VARIED)])}")
        if not values:
            raise LorakitError(f"{where}: grid: `{k}` has no values")
        _no_fixed({key.partition(".")[2]: 0} if key.startswith("train.") else {}, f"{where}: grid: train", tuple(FIXED) if s.budget else ("seed",))
        keys.append(key)
    out = []
    for values in itertools.product(*s.grid.values()):
        one, words = copy.deepcopy(dict(shared)), []
        for key, value in zip(keys, values, strict=True):
            key = f"{key}.{c.SHORT[key]}" if key in c.SHORT and isinstance(value, str) else key
            c._put(one, key, c.number(value))
            words.append(_word(key, value))
        out.append(("-".join(words), one, False))
    return out


def _word(key: str, value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    text = "".join(ch if ch.isalnum() or ch in "_.,+=-" else "_" for ch in text)
    return text if key == "adapter.method" else f"{key.rpartition('.')[2]}{text}"


def read(path: str | Path) -> Compare:
    """A comparison from a YAML file."""
    return parse(c.read_yaml(path), str(path))
