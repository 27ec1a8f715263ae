"""A composition as data: which method, where, from which start, with what frozen. JSON in and out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import nn

from lorakit import host
from lorakit.errors import LorakitError, near
from lorakit.inits import INITS, Init
from lorakit.method import Around, Method, method_from_dict
from lorakit.methods.bitfit import BitFit
from lorakit.methods.full import Full
from lorakit.methods.merge_aware import MergeAware
from lorakit.methods.offset import Offset
from lorakit.methods.tokens import Tokens
from lorakit.methods.trained_bias import TrainedBias
from lorakit.sites import adaptable, named_as, site_at
from lorakit.targets import AROUND, classifier, select, select_parameters, suffixes

_PATH = re.compile(r"\^?[\w\-]+(?:\.[\w\-]+)*")  # a pattern that is only a path, or the end of one
_SEPARATOR = re.compile(r"[\W_]")
STORAGES = ("offset", "base", "none")
BIASES = ("none", "lora_only", "all")


@dataclass(frozen=True)
class Spec:
    """Everything about an adapter but its tensors."""

    method: Method
    targets: str | tuple[str, ...] = "all-linear"
    parameters: str | tuple[str, ...] = ()  # parameters that are read, not called: fused experts, any other
    exclude: str | tuple[str, ...] = ()
    layers: str | int | tuple[int, ...] | None = None
    layers_pattern: str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    patterns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # {field: {pattern: value}}; a ? in front: may match nothing
    modules_to_save: tuple[str, ...] = ()
    heads: bool = True  # the freshly made head of a classification model is trained whole, unasked
    bias: str = "none"  # which biases train: none, those of the targets, all of the model's
    tokens: tuple[int, ...] | Mapping[str, Sequence[int]] = ()  # rows of the input embedding that train, or of tables by name
    tie: bool = False  # a weight that is tied to an adapted one follows the adapter
    dropout: float = 0.0
    freeze: tuple[str, ...] = ()  # leaves that do not train
    init: str | None = None
    init_options: Mapping[str, Any] = field(default_factory=dict)  # the start's own, e.g. {niter: 16}
    storage: str = "offset"  # a start whose delta is not zero: kept as frozen copies, taken out of the base, or left in
    seed: int = 0
    recipe: str = ""
    merge_aware: bool = False  # trained as the weight that a quantised base makes of base + update
    prompt: Method | None = None  # a method around the model, beside it and in one adapter with it

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise LorakitError(f"lora_dropout must be at least 0 and below 1, not {self.dropout!r}")
        if self.storage not in STORAGES:
            raise LorakitError(f"init storage: unknown `{self.storage}`{near(self.storage, STORAGES)}")
        if self.bias not in BIASES:
            raise LorakitError(f"bias: unknown `{self.bias}`{near(self.bias, BIASES)}")
        if self.prompt is not None and not isinstance(self.prompt, Around):
            raise LorakitError(f"prompt: {self.prompt.name} does not go around a model; mend: prompt-tuning, prefix-tuning, …")
        for leaf in self.freeze:
            if leaf not in self.method.leaves:
                raise LorakitError(f"freeze: {self.method.name} has no leaf `{leaf}`{near(leaf, self.method.leaves)}")
        for name, value in ((k, v) for k, at in self.patterns.items() for v in at.values()):
            self.method.having(**{name: value})  # refuses what is no field, or no value of it
        if self.init is not None and self.init not in INITS:
            raise LorakitError(f"init: unknown start `{self.init}`{near(self.init, INITS)}")
        if self.init and (why := INITS[self.init].unfit(self.method)):
            raise LorakitError(why)
        if self.init:
            INITS[self.init].check(self.init_options)

    def plan(self, model: nn.Module) -> dict[str, Method]:
        """Path -> method for this model. Raises LorakitError on names and patterns that match nothing."""
        modules, saved = dict(host.walk(model)), list(dict.fromkeys([*self.modules_to_save, *(classifier(model) if self.heads else ())]))
        parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)} if saved else set()
        kept = {p: Full() if p in modules else Full(False, trains=p in parameters) for p in _whole(model, saved)} | self._rows(model)
        paths = select(model, self.targets, self.exclude, self.layers, self.layers_pattern) if self.targets else []
        paths += select_parameters(model, self.parameters) if self.parameters else []
        paths = [p for p in dict.fromkeys(paths) if p not in kept]
        plan = dict.fromkeys(paths, self.method)
        for what, patterns, name in (("rank_pattern", self.rank_pattern, "r"), ("alpha_pattern", self.alpha_pattern, "alpha"),
                                     *((f"patterns of {k}", at, k) for k, at in self.patterns.items())):
            known, loose = named_as(modules, paths), {k[1:]: v for k, v in patterns.items() if k[0] == "?"}
            hits = matched(what, loose, paths, False, known) | matched(what, {k: v for k, v in patterns.items() if k[0] != "?"}, paths, names=known)
            for path, value in hits.items():
                plan[path] = plan[path].having(**{name: value})
        plan = {p: m.on(site_at(modules, p)) if type(m.core).on is not Method.on else m for p, m in plan.items()}
        if self.prompt is not None:
            words = {kind: word for word, kind in AROUND.items()}
            plan |= {p: self.prompt.on(site_at(modules, p)) for p in select(model, words[self.prompt.around_a])}
        if self.bias != "none":
            plan = {p: m if isinstance(m, Around) else TrainedBias(m) for p, m in plan.items()}
        if self.merge_aware:
            plan = {p: m if isinstance(m, Around) else MergeAware(m) for p, m in plan.items()}
        plan |= kept
        return plan | (_biases(model, plan) if self.bias == "all" else {})

    def _rows(self, model: nn.Module) -> dict[str, Method]:
        if not self.tokens:
            return {}
        modules = dict(model.named_modules())
        tables = self.tokens
        if not isinstance(tables, Mapping):
            get = getattr(model, "get_input_embeddings", None)
            body = get() if get is not None else None
            name = next((n for n, m in modules.items() if m is body), None)
            if name is None:
                raise LorakitError(f"trainable_token_indices: this {type(model).__name__} has no input embedding; mend: {{name of the table: [rows]}}")
            tables = {name: tables}
        return {p: Tokens(tuple(rows), "in" if site_at(modules, p).lookup else "out") for t, rows in tables.items() for p in select(model, [t])}

    def tied(self, model: nn.Module, plan: Mapping[str, Method]) -> tuple[dict[str, Method], dict[str, str]]:
        """The plan with the targets that follow a tied weight, and follower -> source."""
        modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if adaptable(m) and "weight" in m._parameters}
        same: dict[int, list[str]] = {}
        for n, m in modules.items():
            if id(m) not in {id(modules[k]) for k in same.get(id(m._parameters["weight"]), ())}:
                same.setdefault(id(m._parameters["weight"]), []).append(n)
        out, ties = dict(plan), {}
        shared = [p for p in plan if p in modules and len(same.get(id(modules[p]._parameters["weight"]), ())) > 1]
        for source in sorted(shared, key=lambda p: not site_at(modules, p).lookup):
            if source in ties or not (self.tie or plan[source].follows):
                continue
            for n in same.get(id(modules[source]._parameters["weight"]), ()):
                if n != source and not (n in plan and not self.tie):
                    flip = site_at(modules, n).lookup != site_at(modules, source).lookup
                    ties[n], out[n] = source, plan[source].transposed() if flip else plan[source]
        return out, ties

    def to_dict(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        nested = {"method": self.method.to_dict(), "prompt": self.prompt and self.prompt.to_dict()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items()} | nested

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Spec:
        d = {k: tuple(v) if isinstance(v, list) else v for k, v in d.items()}
        return cls(**d | {k: method_from_dict(d[k]) for k in ("method", "prompt") if d.get(k)})


def _whole(model: nn.Module, names: Sequence[str]) -> list[str]:
    """What stands for modules that are to be trained whole: layers, and the parameters and buffers of what is no layer; a container, all inside."""
    if not names:
        return []
    every = {n: m for n, m in model.named_modules() if not isinstance(m, host.Leaves | host.Holder)}
    wanted, hit, out = set(names), set(), []
    for path, module in every.items():
        parts = path.split(".")
        found = {".".join(parts[a:b]) for b in range(1, len(parts) + 1) for a in range(b)} & wanted
        hit |= found
        if found and next(module.parameters(recurse=False), None) is not None:
            own = [n for n, t in [*module._parameters.items(), *module._buffers.items()]
                   if t is not None and n not in module._non_persistent_buffers_set]
            out += [path] if adaptable(module) else [f"{path}.{n}" if path else n for n in own]
    for name in names:
        if name not in hit:
            raise LorakitError(f"modules_to_save: no module is called `{name}`{near(name, sorted({n.rpartition('.')[2] for n in every}))}")
    return list(dict.fromkeys(out))


def _biases(model: nn.Module, plan: Mapping[str, Method]) -> dict[str, Method]:
    """Every bias of the model that no method in the plan has yet."""
    every = {n: m for n, m in model.named_modules() if not isinstance(m, host.Leaves | host.Holder)}
    taken = {f"{p}.bias" for p in plan} | {p.replace("weight", "bias") for p in plan} | {f"{p}_bias" for p in plan} | set(plan)
    out: dict[str, Method] = {}
    for n, m in every.items():
        for k, t in m._parameters.items():
            path = f"{n}.{k}" if n else k
            if t is not None and "bias" in k and path not in taken:
                layer = k == "bias" and adaptable(m)
                out[n if layer else path] = BitFit() if layer else Full(False)
    return out


def matched(what: str, patterns: Mapping[str, Any], paths: Sequence[str], strict: bool = True,
            names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Path -> value of the first pattern that matches its end, as PEFT reads them. Plain paths are looked up, the rest is one expression.

    names: what patterns know a path by, where that is not itself.
    """
    known, numbers = names or {}, {k: n for n, k in enumerate(patterns)}
    plain: dict[str, list[str]] = {}  # a key that is the end of a path, its dots and underscores alike -> such keys
    for k in (k for k in patterns if _PATH.fullmatch(k)):
        plain.setdefault(_SEPARATOR.sub(".", k.removeprefix("^")), []).append(k)
    keys = [k for k in patterns if not _PATH.fullmatch(k)]
    try:
        regex = re.compile("|".join(f"(?P<k{n}>(?:.*\\.)?(?:{k})$)" for n, k in enumerate(keys))) if keys else None
    except re.error as e:
        raise LorakitError(f"{what}: a key is not a regular expression: {e}") from None
    hits, used = {}, set()
    for p in paths if patterns else ():
        name = known.get(p, p)
        found = [k for end in suffixes(name) for k in plain.get(_SEPARATOR.sub(".", end), ()) if _is_end(k, end, name)]
        found += [keys[int(m.lastgroup[1:])]] if regex and (m := regex.match(name)) else []
        used.update(found)
        if found:
            hits[p] = min(found, key=numbers.__getitem__)
    for k in patterns if strict else ():
        if k not in used and not (not _PATH.fullmatch(k) and any(re.match(rf"(?:.*\.)?(?:{k})$", known.get(p, p)) for p in paths)):
            ends = sorted({p.rsplit(".", 1)[-1] for p in paths})
            raise LorakitError(f"{what}: no target matches `{k}`{near(k, ends)}")
    return {p: patterns[k] for p, k in hits.items()}


def _is_end(key: str, end: str, name: str) -> bool:
    """Whether a key that is a plain path matches this end of a name: a dot stands for any character, ^ for the beginning."""
    bare = key.removeprefix("^")
    return len(bare) == len(end) and all(a in (b, ".") for a, b in zip(bare, end, strict=True)) and (key[0] != "^" or end == name)


def _look(model: nn.Module, init: Init, spec: Spec, plan: Mapping[str, Method], data: Iterable | None,
          found: Mapping[str, Any] | None) -> tuple[dict[str, Method], Mapping[str, Any]]:
    """The plan as a start that needs data wants it, and what it found for each target."""
    if data is None and found is None:
        raise LorakitError(f"init {init.name} looks at data; mend: lorakit.adapt(…, data=batches), batches being dictionaries of the model's inputs")
    modules, options = dict(host.walk(model)), init.check(spec.init_options)
    starts = {p: (m, site_at(modules, p)) for p, m in plan.items() if init.unfit(m) is None}
    found = init.collect(model, starts, islice(data, spec.init_options.get("batches")), options) if found is None else found
    if missing := next((p for p in starts if p not in found), None):
        raise LorakitError(f"{missing}: init {init.name}: no batch reaches this layer; mend: other data, or leave it out of the targets")
    changed = init.allot({p: m for p, (m, _) in starts.items()}, found, options) if init.allot else {}
    plan = {p: m for p, m in (dict(plan) | changed).items() if m is not None}
    return plan, found


def attach(model: nn.Module, name: str, spec: Spec, plan: Mapping[str, Method], empty: bool = False, data: Iterable | None = None,
           found: Mapping[str, Any] | None = None) -> None:
    """Puts a composition on the model for a plan already made (path -> method) and makes it the active adapter (the last, in a chain).

    empty: leaves are left unset, about to be loaded. data: batches (dicts of the model's inputs) for a start that looks at some;
    found: what such a start has seen already, target -> statistics, in their place.
    """
    init = INITS[spec.init] if spec.init else None
    if data is not None and not (init and init.collect):
        raise LorakitError(f"data: {f'init {spec.init}' if init else 'this start'} looks at no data; mend: leave it out, or init: "
                           + ", ".join(n for n, i in INITS.items() if i.collect))
    if init and init.collect and not empty:
        plan, found = _look(model, init, spec, plan, data, found)
    options, absorb = init.check(spec.init_options) if init else {}, False
    if init and init.nonzero and not empty:
        storage = "base" if init.joint else "none" if init.mends else spec.storage
        absorb = storage == "base"
        starts = {p for p, m in plan.items() if init.unfit(m) is None}
        offset = {p: m.over_core(Offset) if p in starts and storage != "none" else m for p, m in plan.items()}  # refuses what cannot be
        plan = plan if absorb else offset
    plan, ties = spec.tied(model, plan)
    if absorb and ties:
        raise LorakitError(f"a start taken out of the base would part {next(iter(ties))} from the weight it is tied to; mend: storage: offset")

    def start(path, core, p, origin, gen):
        return init(core, p, origin, gen, (found or {}).get(path), **options) if init.unfit(core) is None else None

    state = host.attach(model, name, plan, spec, dropout=spec.dropout, freeze=spec.freeze, start=start if init else None,
                        absorb=absorb, seed=spec.seed, empty=empty, ties=ties)
    state.active = state.active | {name: 1.0} if state.chained else {name: 1.0}
