"""What a search may vary: choices and ranges by the keys of a run, and the configuration that a draw of them makes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from lorakit.errors import LorakitError, near
from lorakit.experiments.config import put, varied
from lorakit.recipes import ALIASES, compose
from lorakit.training import config as c
from lorakit.training.config import Run

RANGE = ("low", "high", "log", "step")
MOST = 1000  # configurations of a space that are listed to see which are left
WHOLE, METHOD = "adapter", "adapter.method"


def word(value: Any) -> str:
    """A value in a line: q_proj+v_proj, 0.001, [{lora_plus: {ratio: 8}}]."""
    if isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value):
        return "+".join(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()


def short(key: str) -> str:
    """A key without its group."""
    return key.removeprefix("train.").removeprefix("adapter.")


def words(params: Mapping[str, Any]) -> str:
    """Parameters in a line."""
    return ", ".join(f"{short(k)} {word(v)}" for k, v in params.items())


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]

    @property
    def size(self) -> int:
        return len(self.values)

    def draw(self, trial: Any, key: str) -> Any:
        """Asks the search's trial for one, by its word where the storage cannot keep the value."""
        return self.value(trial.suggest_categorical(key, [self.stored(v) for v in self.values]))

    def value(self, stored: Any) -> Any:
        return next(v for v in self.values if self.stored(v) == stored and isinstance(v, bool) == isinstance(stored, bool))

    def stored(self, value: Any) -> Any:
        return value if isinstance(value, bool | int | float | str) else word(value)

    def has(self, value: Any) -> bool:
        return value in self.values

    def all(self) -> Iterator[Any]:
        return iter(self.values)

    def samples(self) -> tuple[Any, ...]:
        """Values that tell whether the whole of it is valid."""
        return self.values

    def __str__(self) -> str:
        return ", ".join(map(word, self.values))


@dataclass(frozen=True)
class Range:
    """A number from low to high, both included; whole where both are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        return all(isinstance(v, int) for v in (self.low, self.high, self.step or 1))

    @property
    def size(self) -> int | None:
        """How many values it has; None: a continuum."""
        step = self.step or (1 if self.whole else None)
        return None if step is None else math.floor((self.high - self.low) / step + 1e-9) + 1

    def draw(self, trial: Any, key: str) -> Any:
        if self.whole:
            return trial.suggest_int(key, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(key, self.low, self.high, step=self.step, log=self.log)

    def value(self, stored: Any) -> Any:
        return int(stored) if self.whole else float(stored)

    stored = value

    def has(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        step = self.step or (1 if self.whole else None)
        return step is None or abs((value - self.low) / step - round((value - self.low) / step)) < 1e-9

    def all(self) -> Iterator[Any]:
        step = self.step or 1
        return (self.low + k * step for k in range(self.size or 0))

    def samples(self) -> tuple[Any, ...]:
        return (self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}" + (f" in steps of {self.step:g}" if self.step else "") + " (logarithmic)" * self.log


Axis = Choice | Range


def axis(value: Any, where: str) -> Axis:
    """A list is a choice, {low, high, log, step} a range. LorakitError for what is neither, empty, or the wrong way round."""
    if isinstance(value, Mapping):
        for k in value:
            if k not in RANGE:
                raise LorakitError(f"{where}: unknown key `{k}`{near(k, RANGE)}")
        v = {k: c.number(x) for k, x in value.items()}
        for k in ("low", "high"):
            if k not in v:
                raise LorakitError(f"{where}: a range needs `{k}`")
        for k in ("low", "high", "step"):
            if k in v and (isinstance(v[k], bool) or not isinstance(v[k], int | float) or not math.isfinite(v[k])):
                raise LorakitError(f"{where}.{k}: a number, not {v[k]!r}")
        if not v["low"] < v["high"]:
            raise LorakitError(f"{where}: low must be below high, not {v['low']:g} and {v['high']:g}")
        if not isinstance(v.get("log", False), bool):
            raise LorakitError(f"{where}.log: true or false, not {v['log']!r}")
        if v.get("log") and (v["low"] <= 0 or "step" in v):
            raise LorakitError(f"{where}: a logarithmic range begins above 0 and has no step")
        if v.get("step", 1) <= 0:
            raise LorakitError(f"{where}.step: must be above 0, not {v['step']:g}")
        return Range(**v)
    if not isinstance(value, list):
        raise LorakitError(f"{where}: a list of values or a range {{low: …, high: …}}, not {value!r}")
    values = tuple(c.number(v) for v in value)
    if not values:
        raise LorakitError(f"{where} has no values")
    out = Choice(values)
    if len({out.stored(v) for v in values}) < len(values):
        raise LorakitError(f"{where}: a value stands there twice: {out}")
    return out


@dataclass(frozen=True)
class Space:
    """The axes of a search, by the full names of their keys, over a configuration that says the rest."""

    axes: dict[str, Axis]
    settings: dict[str, Any]  # of the default

    @property
    def size(self) -> int | None:
        """How many configurations there are at most; None: a continuum."""
        sizes = [a.size for a in self.axes.values()]
        return None if None in sizes else math.prod(sizes)

    def draw(self, trial: Any) -> dict[str, Any]:
        """{key: value} from the search's trial; options that its method does not have are not asked for."""
        out: dict[str, Any] = {}
        for key, a in self.axes.items():
            if self._applies(key, out):
                out[key] = a.draw(trial, key)
        return out

    def apply(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The default's settings with these. Options of the default's method that another method does not have are left out with it."""
        out = copy.deepcopy(self.settings)
        for key in [k for k in (WHOLE, METHOD) if k in params] + [k for k in params if k not in (WHOLE, METHOD)]:
            put(out, key, copy.deepcopy(params[key]))
        name, given = params.get(METHOD), {k.partition(".")[2] for k in params}
        if name is not None and name != self.settings.get("adapter", {}).get("method", "lora"):
            out["adapter"] = {k: v for k, v in out["adapter"].items() if k == "method" or k in given or takes(name, k, [v])}
        return out

    def within(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What of these values lies in the space, as the storage keeps it."""
        return {k: self.axes[k].stored(v) for k, v in params.items() if self.axes[k].has(v)}

    def default(self, run: Run) -> dict[str, Any]:
        """{key: the default configuration's value}, of the keys that it has."""
        return {k: a.value(a.stored(v)) if a.has(v) else v for k, a in self.axes.items() if self._applies(k, {}) for v in _of(run, k)}

    def left(self, tried: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
        """The configurations that were not tried; None where there are too many to list."""
        if self.size is None or self.size > MOST:
            return None
        seen, out = {fingerprint(t) for t in tried}, []
        for values in itertools.product(*(a.all() for a in self.axes.values())):
            drawn: dict[str, Any] = {}
            for key, value in zip(self.axes, values, strict=True):
                if self._applies(key, drawn):
                    drawn[key] = value
            if fingerprint(drawn) not in seen:
                seen.add(fingerprint(drawn))
                out.append(drawn)
        return out

    def _applies(self, key: str, drawn: Mapping[str, Any]) -> bool:
        top, _, option = key.partition(".")
        if top != "adapter" or not option or key == METHOD:
            return True
        adapter = drawn.get(WHOLE, self.settings.get("adapter", {}))
        return takes(drawn.get(METHOD, adapter.get("method", "lora")), option, self.axes[key].samples())


def fingerprint(params: Mapping[str, Any]) -> str:
    """Equal for equal parameters."""
    return json.dumps(params, sort_keys=True, default=str)


def takes(method: str, option: str, values: Any) -> bool:
    """Whether a method has this option, with one of these values at least."""
    for value in values:
        try:
            compose(method, **{option: value})
            return True
        except LorakitError:
            continue
    return False


def _of(run: Run, key: str) -> Iterator[Any]:
    """The value of a key in a run; nothing where it has none."""
    top, _, name = key.partition(".")
    if not name:
        yield getattr(run, top)
    elif key == METHOD:
        yield run.adapter.get("method", "lora")
    elif top != "adapter":
        yield getattr(getattr(run, top), name)
    else:
        spec = run.spec()
        part: Any = spec if name in {f.name for f in dataclasses.fields(spec)} else spec.method
        while part is not None and not hasattr(part, name):
            part = getattr(part, "inner", None)
        if part is not None:
            value = getattr(part, name)
            yield list(value) if isinstance(value, tuple) else value


def canonical(key: str, where: str) -> str:
    """The one spelling of a key: r for lora_r, targets for target_modules."""
    key = varied(key, where)
    top, _, name = key.partition(".")
    return f"adapter.{ALIASES.get(name, name)}" if top == "adapter" and name else key
