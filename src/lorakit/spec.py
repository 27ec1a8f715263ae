"""A composition as data: which method, where, from which start, with what frozen. JSON in and out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorakit import host
from lorakit.errors import LorakitError, near
from lorakit.inits import INITS
from lorakit.method import Method, method_from_dict
from lorakit.methods.full import Full
from lorakit.methods.offset import Offset
from lorakit.targets import classifier, select

STORAGES = ("offset", "base", "none")


@dataclass(frozen=True)
class Spec:
    """Everything about an adapter but its tensors."""

    method: Method
    targets: str | tuple[str, ...] = "all-linear"
    exclude: str | tuple[str, ...] = ()
    layers: str | int | tuple[int, ...] | None = None
    layers_pattern: str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    dropout: float = 0.0
    freeze: tuple[str, ...] = ()  # leaves that do not train
    init: str | None = None
    storage: str = "offset"  # a start whose delta is not zero: kept as frozen copies, taken out of the base, or left in
    seed: int = 0
    recipe: str = ""

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise LorakitError(f"lora_dropout must be at least 0 and below 1, not {self.dropout!r}")
        if self.storage not in STORAGES:
            raise LorakitError(f"init storage: unknown `{self.storage}`{near(self.storage, STORAGES)}")
        for leaf in self.freeze:
            if leaf not in self.method.leaves:
                raise LorakitError(f"freeze: {self.method.name} has no leaf `{leaf}`{near(leaf, self.method.leaves)}")
        if self.init is not None and self.init not in INITS:
            raise LorakitError(f"init: unknown start `{self.init}`{near(self.init, INITS)}")
        for leaf in INITS[self.init].needs if self.init else ():
            if leaf not in self.method.core.own:
                raise LorakitError(f"init {self.init} sets the leaf {leaf}, which {self.method.core.name} does not have")

    def plan(self, model: nn.Module) -> dict[str, Method]:
        """Path -> method for this model. Raises LorakitError on names and patterns that match nothing."""
        saved = list(dict.fromkeys([*self.modules_to_save, *classifier(model)]))
        full = select(model, _whole(model, saved)) if saved else []
        paths = [p for p in select(model, self.targets, self.exclude, self.layers, self.layers_pattern) if p not in set(full)]
        plan = dict.fromkeys(paths, self.method)
        for what, patterns, name in (("rank_pattern", self.rank_pattern, "r"), ("alpha_pattern", self.alpha_pattern, "alpha")):
            for path, value in matched(what, patterns, paths).items():
                plan[path] = plan[path].having(**{name: value})
        return plan | dict.fromkeys(full, Full())

    def to_dict(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items()} | {"method": self.method.to_dict()}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Spec:
        d = {k: tuple(v) if isinstance(v, list) else v for k, v in d.items()}
        return cls(**d | {"method": method_from_dict(d["method"])})


def _whole(model: nn.Module, names: Sequence[str]) -> list[str]:
    """modules_to_save may name a container (a two-layer head): the layers inside stand for it."""
    every, out = {n: m for n, m in model.named_modules() if not isinstance(m, host.Leaves)}, []
    for name in names:
        inside = [n for n in every if n.startswith(name + ".") and next(every[n].parameters(recurse=False), None) is not None]
        out += inside or [name]
    return out


def matched(what: str, patterns: Mapping[str, Any], paths: Sequence[str], strict: bool = True) -> dict[str, Any]:
    """Path -> value of the first pattern that matches its end, as PEFT reads them. One combined expression, not one each."""
    if not patterns:
        return {}
    keys = list(patterns)
    try:
        regex = re.compile("|".join(f"(?P<k{n}>(?:.*\\.)?(?:{k})$)" for n, k in enumerate(keys)))
    except re.error as e:
        raise LorakitError(f"{what}: a key is not a regular expression: {e}") from None
    hits = {p: keys[int(m.lastgroup[1:])] for p in paths if (m := regex.match(p))}
    for k in keys if strict else ():
        if k not in hits.values() and not any(re.match(rf"(?:.*\.)?(?:{k})$", p) for p in paths):
            ends = sorted({p.rsplit(".", 1)[-1] for p in paths})
            raise LorakitError(f"{what}: no target matches `{k}`{near(k, ends)}")
    return {p: patterns[k] for p, k in hits.items()}


def attach(model: nn.Module, name: str, spec: Spec, plan: Mapping[str, Method], empty: bool = False) -> None:
    """Puts a composition on the model for a plan already made (path -> method) and makes it the active adapter (the last, in a chain).

    empty: leaves are left unset, about to be loaded.
    """
    init = INITS[spec.init] if spec.init else None
    absorb = False
    if init and init.nonzero and not empty:
        absorb = spec.storage == "base"
        offset = {p: m if m.replaces or spec.storage == "none" else m.over_core(Offset) for p, m in plan.items()}  # refuses what cannot be
        plan = plan if absorb else offset

    def start(core, p, origin, gen):
        if all(leaf in p for leaf in init.needs):
            init(core, p, origin, gen)

    state = host.attach(model, name, plan, spec, dropout=spec.dropout, freeze=spec.freeze, start=start if init else None,
                        absorb=absorb, seed=spec.seed, empty=empty)
    state.active = state.active | {name: 1.0} if state.chained else {name: 1.0}
