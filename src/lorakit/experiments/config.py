"""The configuration of a comparison: what `lorakit train` takes, and cells, a grid, seeds, a budget, tuning, what else is measured."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from lorakit.errors import LorakitError, near
from lorakit.training import config as c
from lorakit.training.config import Part, Run

METRICS = {"eval_loss": False, "perplexity": False, "accuracy": True, "exact_match": True, "preference_accuracy": True,
           "f1": True, "rouge_l": True, "bleu": True}  # name -> higher is better
EXTRA = ("f1", "rouge_l", "bleu")  # measured by a comparison alone
SHARED = ("base", "task", "data", "train", "eval", "hooks", "adapter")
VARIED = ("adapter", "train", "hooks")  # data and base are the same in every cell
FIXED = {"seed": "seeds", "max_steps": "budget", "epochs": "budget", "learning_rate": "tune"}


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


class Tune(Part):
    """The learning rate of each configuration: one grid and one budget for all, judged on rows that neither train nor end in the table."""

    learning_rate: list[float] = Field(..., description="the grid")
    budget: Budget = Field(..., description="of each trial")
    seed: int = Field(1000, ge=0, description="of the trials, and of the rows that judge them; none of `seeds`")
    fraction: float = Field(0.1, gt=0, lt=1, description="share of the training rows that judges and does not train")
    extend: int = Field(0, ge=0, description="trials more, at most, past the grid's end while the best rate is the last one there; the same for all cells")

    @field_validator("learning_rate")
    @classmethod
    def _grid(cls, v: list[float]) -> list[float]:
        if len(v) < 2 or len({f"{x:g}" for x in v}) < len(v) or not all(0 < x < float("inf") for x in v):
            raise ValueError("a grid is two different rates at least, all above 0, that differ in six digits")
        return sorted(v)


class Forgetting(Part):
    """Rows of another kind, on which the loss is measured before and after."""

    data: str = Field(..., description="file, folder or hub name")
    split: str | None = Field(None, description="split of it")
    columns: dict[str, str] = Field({}, description="our name -> the column's name")
    limit: int | None = Field(None, ge=1, description="use only the first rows")


class Cell(Part):
    """One configuration of the list."""

    name: str | None = Field(None, pattern=r"^\w[\w.,+=-]*$", description="also the name of its folder; by default its method's name")
    adapter: dict[str, Any] | str | None = Field(None, description="method and options, as for lorakit train")
    train: dict[str, Any] = Field({}, description="settings of `train` that differ in this cell")
    hooks: list[str | dict[str, Any]] | None = Field(None, description="in place of the hooks of all cells")
    base: bool = Field(False, description="true: the untouched base, measured and not trained; the same as adapter: none")
    quantize: str | dict[str, Any] | None = Field(None, description="how the base's linear layers are kept in this cell, as base.quantize")
    backend: Literal["lorakit", "peft", "transformers"] = Field(
        "lorakit", description="whose layers train. peft: PEFT's own, the options are those of its configurations; transformers: adapter: full, every weight")

    @model_validator(mode="after")
    def _what(self) -> Cell:
        if self.named() == "none" and not self.base:
            self.base, self.adapter = True, None
        if self.base and (self.adapter is not None or self.train or self.hooks or self.backend != "lorakit"):
            raise ValueError("base: true is the untouched base and takes no adapter, train, hooks or backend")
        if not self.base and self.adapter is None:
            raise ValueError("needs an adapter, or base: true")
        if self.backend == "transformers" and self.adapter not in ("full", {"method": "full"}):
            raise ValueError("backend: transformers trains every weight and takes adapter: full alone")
        if self.named() == "linear-probe" and (self.options() or self.backend != "lorakit"):
            raise ValueError("adapter: linear-probe trains the classifier's head alone and takes no options and no backend")
        if self.kind() != "lorakit" and self.hooks:
            raise ValueError("hooks act on lorakit's adapters; this cell has none")
        return self

    def named(self) -> str:
        name = self.adapter if isinstance(self.adapter, str) else (self.adapter or {"method": ""}).get("method", "lora")
        return str(name).lower().replace("_", "-")

    def options(self) -> dict[str, Any]:
        return {k: v for k, v in self.adapter.items() if k != "method"} if isinstance(self.adapter, dict) else {}

    def kind(self) -> str:
        if self.backend == "lorakit" and self.named() == "linear-probe":
            return "probe"
        return "none" if self.base else {"lorakit": "lorakit", "peft": "peft", "transformers": "full"}[self.backend]

    def label(self) -> str:
        return self.name or ("base" if self.base else self.named() + (f"-{self.backend}" if self.backend != "lorakit" else ""))


class Judged(Part):
    """How long a run is, and how configurations are told apart."""

    seeds: int | list[int] = Field(3, description="how many, or which")
    budget: Budget | None = Field(None, description="without it, `train` says how long")
    metric: str | None = Field(None, description="what is compared; by default accuracy, else exact match, else loss")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of intervals and of what counts as a difference")

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


class Settings(Judged):
    """The keys that a comparison has beside those of a run."""

    metrics: list[str] = Field([], description="what is measured besides: f1 of classes, rouge_l and bleu of generated answers")
    tune: Tune | None = Field(None, description="the learning rate of each configuration, chosen with an equal budget")
    forgetting: Forgetting | None = Field(None, description="other data, measured before and after; a bare word is its `data`")
    cells: list[Cell] = Field([], description="named configurations")
    grid: dict[str, list[Any]] = Field({}, description="adapter.KEY or train.KEY -> values; every combination is a cell")
    output: str = Field("runs/comparison", description="folder of the comparison")

    @field_validator("forgetting", mode="before")
    @classmethod
    def _word(cls, v: Any) -> Any:
        return {"data": v} if isinstance(v, str) else v


@dataclass(frozen=True)
class Trial:
    """One cell with one seed, ready to run."""

    cell: str
    seed: int
    run: Run
    kind: str  # lorakit, peft, full (every weight), probe (the head), none (the untouched base)
    budget: dict[str, float]
    peft: dict[str, Any] | None = None  # PEFT's configuration
    extra: tuple[str, ...] = ()  # metrics that only a comparison measures
    forgetting: dict[str, Any] | None = None
    tunes: float | None = None  # the learning rate that this trial tries; None in a run that counts
    number: int | None = None  # of a search's trial; None in a run that counts

    @property
    def untouched(self) -> bool:
        return self.kind == "none"

    @property
    def name(self) -> str:
        if self.number is not None:
            return f"trial {self.number}"
        return f"{self.cell} seed {self.seed}" if self.tunes is None else f"{self.cell} learning rate {self.tunes:g}"

    @property
    def counts(self) -> bool:
        """Whether it ends in a table, not in a choice."""
        return self.tunes is None and self.number is None

    @property
    def folder(self) -> Path:
        return Path(self.run.output)

    def rated(self, rate: float) -> Trial:
        """The same with this learning rate."""
        return replace(self, run=self.run.model_copy(update={"train": self.run.train.model_copy(update={"learning_rate": rate})}))

    def trying(self, rate: float) -> Trial:
        """The trial of this learning rate, in a folder beside this one."""
        run = self.run.model_copy(update={"output": str(self.folder.parent / f"tune-{rate:g}")})
        return replace(self, run=run, tunes=rate).rated(rate)

    def on(self, data: dict[str, Any]) -> Trial:
        """The same with these settings of `data`."""
        return replace(self, run=self.run.model_copy(update={"data": self.run.data.model_copy(update=data)}))

    def head(self, digest: str) -> dict[str, Any]:
        """What its files say about it."""
        return {"cell": self.cell, "seed": self.seed, "tunes": self.tunes, "digest": digest}

    def settings(self) -> dict[str, Any]:
        """All that decides its result, flat; the place where it is kept does not."""
        run = self.run.model_dump(mode="json")
        run.pop("output")
        if self.kind != "lorakit":
            run.pop("adapter")
        rest = {"kind": self.kind, "budget": self.budget, "peft": self.peft, "metrics": list(self.extra), "forgetting": self.forgetting}
        return _flat(run) | _flat(rest)


@dataclass(frozen=True)
class Compare:
    """A checked comparison."""

    settings: Settings
    trials: list[Trial]
    tuning: list[Trial]  # before them; the learning rates of `trials` come from these

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


def _part(model: type[Part], place: Sequence[Any]) -> type[Part]:
    """The group of settings at a place within another."""
    for p in place:
        field = model.model_fields.get(str(p))
        kinds = [field.annotation, *(getattr(field.annotation, "__args__", ()))] if field else []
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, Part)), model)
    return model


def checked(model: type[Part], raw: Mapping[str, Any], where: str) -> Any:
    """The settings of `raw`. LorakitError naming every wrong key or value."""
    try:
        return model.model_validate(raw)
    except ValidationError as e:
        raise LorakitError(_explain(e, where, model)) from None


def _explain(e: ValidationError, where: str, model: type[Part]) -> str:
    lines = []
    for err in e.errors():
        place = ".".join(map(str, err["loc"]))
        if err["type"] == "extra_forbidden":
            lines.append(f"unknown key `{place}`{near(str(err['loc'][-1]), _part(model, err['loc'][:-1]).model_fields)}")
        else:
            told = err["msg"].removeprefix("Value error, ")
            lines.append(f"`{place}`: {told[0].lower()}{told[1:]}" + (f", not {err['input']!r}" if not isinstance(err["input"], (dict, list)) else ""))
    return f"{where}: " + "; ".join(dict.fromkeys(lines))


def grouped(raw: Mapping[str, Any], own: type[Judged], where: str) -> tuple[Any, dict[str, Any]]:
    """(the settings of an experiment, what its runs share), from one file."""
    known = [*own.model_fields, *SHARED]
    for k in raw:
        if k not in known and k not in c.FLAT:
            raise LorakitError(f"{where}: unknown key `{k}`{near(k, [*known, *c.FLAT])}")
    s = checked(own, {k: v for k, v in raw.items() if k in own.model_fields}, where)
    if s.metric is not None and s.metric not in METRICS:
        raise LorakitError(f"{where}: unknown metric `{s.metric}`{near(s.metric, METRICS)}")
    shared = c._grouped({k: v for k, v in raw.items() if k not in own.model_fields})
    shared["data"] = {"split_seed": 0, **shared.get("data", {})}  # the held-out rows are the same for all seeds
    if s.budget:
        _no_fixed(shared.get("train", {}), f"{where}: train", ("max_steps", "epochs"))
    return s, shared


def a_run(settings: Mapping[str, Any], seed: int, budget: Budget | None, output: Path, where: str) -> Run:
    """One run of these settings: its seed, its length, its folder."""
    mine = copy.deepcopy(dict(settings))
    mine["train"] = {**mine.get("train", {}), "seed": seed, **_length(budget)}
    mine["output"] = str(output)
    run = c.parse(mine, where)
    if budget and budget.seconds and run.train.lr_scheduler_type != "constant":
        raise LorakitError(f"{where}: with a budget of seconds nobody knows where a falling learning rate would end; "
                           "mend: train: {lr_scheduler_type: constant}, or a budget of tokens or steps")
    return run


def amount(budget: Budget | None) -> dict[str, float]:
    """{unit: how much}; empty where `train` says how long."""
    return budget.model_dump(exclude_none=True) if budget else {}


def parse(raw: Mapping[str, Any], where: str = "configuration") -> Compare:
    """A checked comparison from plain data. LorakitError naming every wrong key or value, before anything is run."""
    s, shared = grouped(raw, Settings, where)
    for name in s.metrics:
        if name not in EXTRA:
            raise LorakitError(f"{where}: metrics: unknown metric `{name}`{near(name, EXTRA)}")
    if s.tune and s.tune.seed in s.seeds:
        raise LorakitError(f"{where}: tune: the seed {s.tune.seed} is one of `seeds`, so that what is tuned would be judged by its own luck; mend: another")
    _no_fixed(shared.get("train", {}), f"{where}: train", ("seed", *_tuned(s)))
    rows = [(cell.label(), _of_cell(shared, cell, f"{where}: cell `{cell.label()}`", s), cell) for cell in s.cells]
    rows += [(name, one, Cell(adapter="lora")) for name, one in _of_grid(shared, s, where)]
    if not rows:
        raise LorakitError(f"{where}: nothing to compare; mend: give `cells` or `grid`")
    names = [name for name, *_ in rows]
    for name in names:
        if names.count(name) > 1:
            raise LorakitError(f"{where}: {names.count(name)} cells are called `{name}`; mend: give each its own `name`")
    trials, tuning = [], []
    extra = tuple(dict.fromkeys([*s.metrics, *([s.metric] if s.metric in EXTRA else [])]))
    rest = {"extra": extra, "forgetting": s.forgetting.model_dump() if s.forgetting else None}
    for name, settings, cell in rows:
        def one(seed: int, folder: str, budget: Budget | None, name=name, settings=settings, cell=cell) -> Trial:
            run = a_run(settings, seed, budget, Path(s.output) / name / folder, f"{where}: cell `{name}`")
            peft = {"method": cell.named(), **cell.options()} if cell.kind() == "peft" else None
            return Trial(name, seed, run, cell.kind(), amount(budget), peft, **rest)

        trials += [one(seed, f"seed-{seed}", s.budget) for seed in s.seeds]
        if s.tune and cell.kind() != "none":
            first = one(s.tune.seed, "tune", s.tune.budget)
            tuning += [first.trying(rate) for rate in s.tune.learning_rate]
    return Compare(s, trials, tuning)


def _tuned(s: Settings) -> tuple[str, ...]:
    return ("learning_rate",) if s.tune else ()


def _length(budget: Budget | None) -> dict[str, int]:
    if budget is None:
        return {}
    return {"max_steps": budget.steps or (10**9 if budget.seconds else 1)}  # for tokens, the steps are counted when the data is read


def _no_fixed(train: Mapping[str, Any], where: str, keys: tuple[str, ...]) -> None:
    for k in keys:
        if k in train:
            raise LorakitError(f"{where}.{k}: a comparison takes this from `{FIXED[k]}`; mend: leave it out")


def _keys(s: Settings) -> tuple[str, ...]:
    return ("seed", *(("max_steps", "epochs") if s.budget else ()), *_tuned(s))


def _of_cell(shared: Mapping[str, Any], cell: Cell, where: str, s: Settings) -> dict[str, Any]:
    _no_fixed(cell.train, f"{where}: train", _keys(s))
    adapter = cell.adapter if cell.kind() == "lorakit" and cell.adapter else {"method": "lora"}
    out = {**shared, "train": {**shared.get("train", {}), **cell.train}, "adapter": adapter}
    if cell.quantize is not None:
        base = shared.get("base", {})
        out["base"] = {**(base if isinstance(base, Mapping) else {"path": base}), "quantize": cell.quantize}
    return out if cell.hooks is None else {**out, "hooks": cell.hooks}


def varied(k: str, where: str) -> str:
    """The full name of a key that may differ between configurations. LorakitError with the nearest one."""
    key = k if "." in k or k in VARIED else c.FLAT.get(k, k)
    if key.partition(".")[0] not in VARIED:
        raise LorakitError(f"{where}: unknown key `{k}`{near(k, [*VARIED, *(f for f, to in c.FLAT.items() if to.partition('.')[0] in VARIED)])}")
    return key


def put(settings: dict[str, Any], key: str, value: Any) -> None:
    """Sets a key of a run's settings; a bare word is what it is for `lorakit train`."""
    c._put(settings, f"{key}.{c.SHORT[key]}" if key in c.SHORT and isinstance(value, str) else key, c.number(value))


def _of_grid(shared: Mapping[str, Any], s: Settings, where: str) -> list[tuple[str, dict[str, Any]]]:
    """Every combination, named by its values: `dora-r8`, `lora-r8-learning_rate0.001`."""
    if not s.grid:
        return []
    keys = []
    for k, values in s.grid.items():
        key = varied(k, f"{where}: grid")
        if not values:
            raise LorakitError(f"{where}: grid: `{k}` has no values")
        _no_fixed({key.partition(".")[2]: 0} if key.startswith("train.") else {}, f"{where}: grid: train", _keys(s))
        keys.append(key)
    out = []
    for values in itertools.product(*s.grid.values()):
        one, words = copy.deepcopy(dict(shared)), []
        for key, value in zip(keys, values, strict=True):
            put(one, key, value)
            words.append(_word(key, value))
        out.append(("-".join(words), one))
    return out


def _word(key: str, value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    text = "".join(ch if ch.isalnum() or ch in "_.,+=-" else "_" for ch in text)
    return text if key == "adapter.method" else f"{key.rpartition('.')[2]}{text}"


def read(path: str | Path) -> Compare:
    """A comparison from a YAML file."""
    return parse(c.read_yaml(path), str(path))
