"""Puts adapters on a model in place and takes them off again. Knows no method, no layer type, no dtype.

A hosted module keeps its name, its place and its identity: its class becomes one made from its own, its base keys and ties
stay, `isinstance` stays true, and `detach` gives back the very object. A layer that is called computes through its adapters;
a module that reads parameters (attention, fused experts, any other) runs with the adapted values in their place. One `State`
per model says which adapters are active; every slot points at it, so switching is one assignment and not a walk over modules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import LorakitError, near
from lorakit.maps import Affine, Applied, Base, Map, Once, PerRow, Sum, each, groups, same, spread
from lorakit.method import Method, Origin, Params
from lorakit.sites import NO_ROWS, Place, Site, batch_of, check_caller, place, site_at
from lorakit.stores.dense import held


@dataclass
class State:
    """What all hosted layers of one model share."""

    specs: dict[str, Any] = field(default_factory=dict)  # adapter -> how it was made, for saving
    active: dict[str, float] = field(default_factory=dict)  # adapter -> weight, in order
    chained: bool = False  # each adapter around the one before it, instead of a sum over one base
    rows: tuple[tuple[str, ...], Tensor] | None = None  # mixed batch: names, and for each row an index into them or -1
    merged: dict[str, float] | None = None  # what is merged into the base now
    required_grad: frozenset[str] = frozenset()  # base parameters that trained before the first adapter came
    prints: tuple[Any, Any] | None = None  # the base's fingerprint, and what it was taken of


class Leaves(nn.Module):
    """The tensors that several adapters keep under one leaf name on one layer."""

    def extra_repr(self) -> str:
        return ", ".join(f"{k}: {tuple(v.shape)}" for k, v in self._parameters.items())


class Holder(nn.Module):
    """Carries the leaves of a parameter's adapters, as a child of the module that reads the parameter."""


@dataclass
class Absorbed:
    """An adapter whose start was taken out of the base weight; `kept` puts the untouched base back."""

    adapter: str
    core: Method
    p0: Params
    kept: object


class Slot:
    """What hosting adds to one target: its geometry and the adapters on it. The tensors are children of `module`, the layer or a Holder."""

    def __init__(self, module: nn.Module, site: Site, state: State, path: str = ""):
        self.module, self.site, self.state, self.path = module, site, state, path
        self.methods: dict[str, Method] = {}
        self.dropout: dict[str, float] = {}
        self.tied: dict[str, Slot] = {}  # adapter -> the slot whose very tensors it has here
        self.absorbed: Absorbed | None = None
        self.kept: tuple[object, nn.Parameter | None] | None = None  # the base, while merged

    @property
    def raw(self) -> bool:
        """Whether the target is a parameter by its own name."""
        return isinstance(self.module, Holder)

    def attr(self, adapter: str, leaf: str) -> str:
        """The child under which a leaf lives: its file key without the final `.weight`."""
        key = self.methods[adapter].key(leaf, self.site.lookup)
        return key.removesuffix(".weight").replace(".", "_")

    def params(self, adapter: str) -> Params:
        """The adapter's tensors on this layer; a shared one as the corner that fits here."""
        leaves, out = self.methods[adapter].leaves, self.whole(adapter)
        for leaf, t in out.items():
            if leaves[leaf].shared:
                out[leaf] = t[tuple(slice(n) for n in self.shapes(adapter)[leaf])]
        return out

    def first(self, adapter: str) -> Params:
        """The leaves of one matrix: all of them, or the first of a stack."""
        leaves = self.methods[adapter].leaves
        return {k: t[0] if self.site.stack and not leaves[k].shared else t for k, t in self.params(adapter).items()}

    def whole(self, adapter: str) -> Params:
        """The adapter's tensors on this layer as they are stored, a shared one whole."""
        out = {}
        for leaf in self.methods[adapter].leaves:
            holder = self.module._modules.get(self.attr(adapter, leaf))
            if holder is not None and adapter in holder._parameters:
                out[leaf] = held(holder, adapter)
        return out

    def shapes(self, adapter: str) -> dict[str, list[int]]:
        method, site = self.methods[adapter], self.site
        return {k: s if method.leaves[k].shared else [*site.stack, *s] for k, s in method.shapes(site.out, site.in_, site.bias is not None).items()}

    def put(self, adapter: str, leaf: str, value: nn.Parameter) -> None:
        attr = self.attr(adapter, leaf)
        holder = self.module._modules.get(attr)
        if holder is None:
            if hasattr(self.module, attr):
                raise LorakitError(f"the layer already has an attribute `{attr}`; is another adapter library on this model?")
            holder = Leaves()
            self.module.add_module(attr, holder)
        holder._parameters[adapter] = value

    def drop(self, adapter: str) -> Callable[[Tensor], Tensor]:
        p = self.dropout.get(adapter, 0.0)
        return partial(F.dropout, p=p) if p and self.module.training and self.site.drops else same

    def applied(self, adapter: str, inner: Map, gain: float = 1.0) -> Applied:
        return Applied(self.methods[adapter], self.params(adapter), inner, self.site, self.drop(adapter), gain)

    def map(self, active: Mapping[str, float], bias: Tensor | None = None) -> Map:
        """These adapters over this layer's base, as one map."""
        here = {a: g for a, g in active.items() if a in self.methods}
        base: Map = Base(self.site, bias)
        if self.absorbed and self.absorbed.adapter not in here:  # the base without the adapter that changed it
            base = Applied(self.absorbed.core, self.absorbed.p0, base, self.site)
        if self.state.chained:
            for a, g in here.items():
                base = self.applied(a, base, g)
            return base
        if not here:
            return base
        if len(here) == 1:
            [(a, g)] = here.items()
            return self.applied(a, base, g)
        base = Once(base)
        return Sum(base, [self.applied(a, base, g) for a, g in here.items()])

    def bias(self, active: Mapping[str, float]) -> Tensor | None:
        """The bias beside `map(active)`."""
        b0 = b = self.site.bias
        for a, g in active.items():
            if a in self.methods:
                begun = b if self.state.chained else b0
                new = self.methods[a].bias(self.params(a), begun)
                change = None if new is begun else (new if begun is None else new - begun) * g
                b = b if change is None else change if b is None else b + change
        return b if b is b0 else b.to(self.site.dtype)

    def affine(self, active: Mapping[str, float]) -> Callable[[Tensor], Tensor]:
        """Map and bias; where every adapter only adds to the base's output, the base's own kernel adds the bias."""
        bias = self.bias(active)
        if all(self.methods[a].adds for a in active if a in self.methods):
            return self.map(active, bias)
        return Affine(self.map(active), self.site, bias)

    def call(self) -> Callable[[Tensor], Tensor]:
        if self.state.rows is None:
            return self.affine(self.state.active)
        names, index = self.state.rows
        self.check_rows()
        return PerRow(self.affine({}), [self.affine({n: 1.0}) for n in names], index, self.path)

    def check_rows(self) -> None:
        if NO_ROWS.search(self.path):
            raise LorakitError(f"{self.path} does not get the rows of the batch but a choice of tokens or a table, so a mixed batch cannot be followed "
                               "through it; mend: leave it out of the targets of these adapters")

    def values(self, active: Mapping[str, float]) -> dict[str, Tensor]:
        """Name -> value of the parameters as these adapters make them, in the base's dtype: what a module that reads them is to see."""
        site = self.site
        out = {site.store.name: site.unview(self.map(active).weight()).to(site.dtype)}
        bias = self.bias(active)
        return out if bias is site.bias else out | {site.bias_name: bias.to(site.bias.dtype)}

    def idle(self) -> bool:
        """Whether the layer's own forward is the answer."""
        s = self.state
        wanted = s.active if s.rows is None else s.rows[0]
        return not (self.absorbed and s.merged is None) and not any(a in self.methods for a in wanted)


class Host:
    """Marks a module with adapters; mixed into its class at run time (`class AdaptedLinear(Layer, Linear)`)."""

    own_class: type  # what it was
    mixin: type  # Layer or Reader

    def __reduce_ex__(self, protocol):
        return _rebuild, (self.own_class, self.mixin), self.__dict__


class Layer(Host):
    """A layer that is called with its input."""

    slot: Slot

    def forward(self, *args, **kwargs):
        if self.slot.idle():
            return super().forward(*args, **kwargs)
        x, *more = (*args, *kwargs.values())  # the input may come by name
        if more:
            raise LorakitError(f"{type(self).__name__} was called with more than its input; an adapter would ignore the rest")
        return self.slot.call()(x)


class Reader(Host):
    """A module whose forward reads parameters; it runs with the adapted values in their place."""

    slots: dict[str, Slot]  # the parameter's name among the module's targets -> slot

    def forward(self, *args, **kwargs):
        busy = [s for s in self.slots.values() if not s.idle()]
        if not busy:
            return super().forward(*args, **kwargs)
        rows = busy[0].state.rows
        if rows is None:
            with _reading(busy, busy[0].state.active):
                return super().forward(*args, **kwargs)
        for s in busy:
            s.check_rows()
        batch = batch_of(self, args, kwargs)
        cut = groups(spread(rows[1], batch.n, busy[0].path))
        parts = []
        for i, at in cut:
            a, k = batch.take(at)
            with _reading(busy, {} if i < 0 else {rows[0][i]: 1.0}):
                parts.append(super().forward(*a, **k))
        return batch.join(parts, [at for _, at in cut])


@contextmanager
def _reading(busy: Iterable[Slot], active: Mapping[str, float]) -> Iterator[None]:
    """Inside, the modules find the adapted values under their parameters' names."""
    values = [(s.site.module.__dict__, s.values(active)) for s in busy]
    for where, mine in values:
        where.update(mine)
    try:
        yield
    finally:
        for where, mine in values:
            for name in mine:
                del where[name]


def _rebuild(cls: type, mixin: type) -> nn.Module:
    new = host_class(cls, mixin)
    return new.__new__(new)


@cache
def host_class(cls: type, mixin: type) -> type:
    """`class Adapted<Name>(Layer or Reader, <Name>)`, one for each class."""
    return type(f"Adapted{cls.__name__}", (mixin, cls), {"__module__": __name__, "own_class": cls, "mixin": mixin})


def _take_class(module: nn.Module, mixin: type, path: str) -> None:
    hooked = "_old_forward" in vars(module)  # accelerate wrapped it first: its hook must call us, not the old class
    if "forward" in vars(module) and not hooked:
        raise LorakitError(f"{path or 'this layer'}: its forward was replaced on the instance (by another library?), so an adapter "
                           "would be skipped silently; mend: adapt the model first, or undo that replacement")
    module.__class__ = host_class(type(module), mixin)
    if hooked:
        module._old_forward = MethodType(mixin.forward, module)


def host(modules: Mapping[str, nn.Module], state: State, path: str) -> Slot:
    """Makes the module at a target's place a host, or returns the slot the target already has."""
    at = place(modules, path)
    if at is None:
        raise LorakitError(f"the model has no module or parameter `{path}`{near(path, modules)}")
    module, mixin = modules[at.owner], Reader if at.key else Layer
    if isinstance(module, Host) and module.mixin is not mixin:
        raise LorakitError(f"{path}: another adapter is on {'the layer itself' if at.key else 'a parameter of this layer'}; mend: target the same of the two")
    if isinstance(module, Host) and (slot := slot_in(module, at.key)):
        return slot
    check_caller(modules, path)
    site = site_at(modules, path)
    if not isinstance(module, Host):
        _take_class(module, mixin, path)
    if not at.key:
        module.__dict__["slot"] = Slot(module, site, state, path)
        return module.slot
    keep = module._modules.get(at.key)  # a child layer that is not called carries the leaves itself
    if keep is None:
        keep = Holder().train(module.training)
        module.add_module(f"{at.key}_adapter", keep)
    slot = Slot(keep, site, state, path)
    module.__dict__.setdefault("slots", {})[at.key] = slot
    return slot


def slot_in(module: nn.Module, key: str = "") -> Slot | None:
    """The slot a host has for its own call, or for one of the parameters it reads."""
    return module.__dict__.get("slots", {}).get(key) if key else module.__dict__.get("slot")


def unhost(modules: Mapping[str, nn.Module], at: Place) -> None:
    """Takes a slot off; with its last one a module gets its own class back."""
    module = modules[at.owner]
    if type(module) is not host_class(module.own_class, module.mixin):
        raise LorakitError(f"{at.owner}: {type(module).__name__} is no longer the class an adapter made (sharded since?), so it cannot be taken off here")
    slot = module.__dict__["slots"].pop(at.key) if at.key else module.__dict__.pop("slot")
    if slot.absorbed:
        slot.site.store.put(slot.absorbed.kept)
    if isinstance(slot.module, Holder):
        del module._modules[f"{at.key}_adapter"]
    if module.__dict__.get("slots"):
        return
    module.__dict__.pop("slots", None)
    module.__class__ = module.own_class
    if "_old_forward" in vars(module):
        module._old_forward = MethodType(type(module).forward, module)


def slots_of(module: nn.Module, path: str = "") -> dict[str, Slot]:
    """Path -> slot of the targets of one module."""
    if not isinstance(module, Host):
        return {}
    if slot := module.__dict__.get("slot"):
        return {path: slot}
    return {f"{path}.{k}" if path else k: s for k, s in module.slots.items()}


def slots(model: nn.Module, adapter: str | None = None) -> dict[str, Slot]:
    """Path -> slot of every target, or of those that have this adapter."""
    every = {p: s for n, m in model.named_modules() if isinstance(m, Host) for p, s in slots_of(m, n).items()}
    return every if adapter is None else {n: s for n, s in every.items() if adapter in s.methods}


def state_of(model: nn.Module) -> State:
    """The model's shared state. LorakitError if it has no adapter."""
    state = find_state(model)
    if state is None:
        raise LorakitError(f"this {type(model).__name__} has no adapters; mend: lorakit.adapt(model, ...) or lorakit.load(model, path)")
    return state


def bare(model: nn.Module) -> nn.Module:
    """The model itself, out of a wrapper in the way of PEFT's (`get_base_model`)."""
    get = getattr(type(model), "get_base_model", None)
    return model if get is None else get(model)


def find_state(model: nn.Module) -> State | None:
    """The model's shared state, or None if it has no adapter."""
    return next((s.state for m in model.modules() if isinstance(m, Host) for s in slots_of(m).values()), None)


def known(model: nn.Module, names: Iterable[str]) -> State:
    """The state, after checking that every name is an adapter of the model."""
    state = state_of(model)
    for n in names:
        if n not in state.specs:
            raise LorakitError(f"the model has no adapter `{n}`{near(n, state.specs)}")
    return state


def generator(seed: int, path: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the layer's path alone, not on the order or number of targets."""
    word = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(word[:7], "big"))


StartFn = Callable[[Method, Params, Origin, torch.Generator], None]


def _device(site: Site) -> torch.device:
    device = site.store.read().device
    hook = getattr(site.module, "_hf_hook", None)  # offloaded by accelerate: the weight is on meta, the work is done elsewhere
    where = getattr(hook, "execution_device", None)
    return torch.device(where) if device.type == "meta" and where is not None else device


@torch.no_grad()
def attach(model: nn.Module, name: str, plan: Mapping[str, Method], spec: Any, *, dropout: float = 0.0, freeze: tuple[str, ...] = (),
           start: StartFn | None = None, absorb: bool = False, seed: int = 0, empty: bool = False, ties: Mapping[str, str] | None = None) -> State:
    """Puts one adapter, a method for each path, on the model. All or nothing: on an error the model is as before.

    start: sets leaves away from their own start. absorb: takes delta(start) out of the base. empty: leaves stay unset
    (about to be loaded). ties: target -> the target whose very leaves it has. The base is frozen; leaves are at least
    float32 and live where their target lives.
    """
    if not name or "." in name:
        raise LorakitError(f"an adapter's name is one word without dots, not {name!r}")
    modules, ties = dict(model.named_modules()), ties or {}
    state = find_state(model)
    first, state = state is None, state or State()
    if name in state.specs:
        raise LorakitError(f"the model already has an adapter `{name}`; mend: another name, or lorakit.delete(model, {name!r}) first")
    if state.merged is not None:
        raise LorakitError(f"adapters {sorted(state.merged)} are merged into the base; mend: lorakit.unmerge(model) first")
    if first:
        state.required_grad = frozenset(n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)
    done: dict[str, Slot] = {}
    try:
        bank = _bank(modules, plan, seed, freeze)
        for path, method in sorted(plan.items(), key=lambda kv: kv[0] in ties):
            slot = done[path] = host(modules, state, path)
            slot.methods[name], slot.dropout[name] = method, dropout
            if why := method.unfit(slot.site):
                raise LorakitError(f"{path}: {why}")
            if path in ties:
                _tie(slot, name, done[ties[path]])
            else:
                with _at(path):
                    _fill(slot, name, method, bank, start, absorb, generator(seed, path), freeze, empty)
    except BaseException:
        _strip(modules, name, done)
        raise
    for n, p in model.named_parameters() if first else ():
        p.requires_grad_(p.requires_grad and n not in state.required_grad)
    state.specs[name] = spec
    return state


def _bank(modules, plan: Mapping[str, Method], seed: int, freeze: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Leaves that the whole model shares: each one Parameter, at the largest size any target needs."""
    shared: dict[str, tuple[Method, list[int]]] = {}
    keep, device = torch.float32, None
    for path, method in plan.items():
        if not any(leaf.shared for leaf in method.leaves.values()):
            continue
        site = site_at(modules, path)
        keep, device = torch.promote_types(keep, site.dtype), device or _device(site)
        for k, s in method.shapes(site.out, site.in_).items():
            if method.leaves[k].shared:
                shared[k] = (method, [max(a, b) for a, b in zip(s, shared.get(k, (method, s))[1], strict=True)])
    gen = torch.Generator().manual_seed(seed)
    return {k: nn.Parameter(m.leaves[k].start(s, m.owner(k), Origin(None), gen).to(device, keep), m.leaves[k].trains and k not in freeze)
            for k, (m, s) in shared.items()}


@contextmanager
def _at(path: str) -> Iterator[None]:
    """An error inside says at which target."""
    try:
        yield
    except LorakitError as e:
        raise LorakitError(str(e) if path in str(e) else f"{path}: {e}") from None


def _tie(slot: Slot, name: str, source: Slot) -> None:
    slot.tied[name], slot.dropout[name] = source, 0.0
    for leaf in source.whole(name):
        slot.put(name, leaf, source.module._modules[source.attr(name, leaf)]._parameters[name])


def _fill(slot: Slot, name, method: Method, bank, start, absorb, gen, freeze, empty) -> None:
    site, device = slot.site, _device(slot.site)
    keep = torch.promote_types(site.dtype, torch.float32)  # adapters never live below float32
    keep = keep if site.dtype.is_floating_point else site.dtype  # but a counter stays one
    if empty or device.type == "meta":
        p = {k: torch.empty(s) for k, s in slot.shapes(name).items()}
    else:
        p = _begin(slot, name, method, start, absorb, gen)
    for k, v in p.items():
        trains = method.leaves[k].trains and k not in freeze
        slot.put(name, k, bank[k] if k in bank else nn.Parameter(v.to(device, keep).contiguous(), trains))


def _begin(slot: Slot, name: str, method: Method, start, absorb: bool, gen: torch.Generator) -> Params:
    """The leaves at their start, on the CPU in float32; every matrix of a stack has its own."""
    site = slot.site
    base = slot.map(slot.state.active) if slot.state.chained else Base(site)  # around those in effect, or around the target
    whole: list[Tensor] = []  # the base, read once and only if something asks

    def origin(n: int) -> Origin:
        def W() -> Tensor:
            whole[:] = whole or [base.weight().to("cpu", torch.float32)]
            return whole[0][n] if site.stack else whole[0]

        bias = None if site.bias is None else site.bias.to("cpu")
        return Origin(W, bias[n] if bias is not None and site.stack else bias, site.lookup)

    many = range(site.stack[0] if site.stack else 1)
    p = [method.start(site.out, site.in_, origin(n), gen) for n in many]
    for n in many if start else ():
        start(method.core, p[n], origin(n), gen)
    if absorb:
        _absorb(slot, name, method.core, _stacked(method, [{k: q[k].clone() for k in method.core.leaves} for q in p], site))
        whole.clear()
    for n in many:
        method.settle(p[n], origin(n))
    return _stacked(method, p, site)


def _stacked(method: Method, p: list[Params], site: Site) -> Params:
    return {k: torch.stack([q[k] for q in p]) if site.stack and not method.leaves[k].shared else p[0][k] for k in p[0]}


@torch.no_grad()
def _absorb(slot: Slot, name: str, core: Method, p0: Params) -> None:
    """base := base - delta(p0), keeping the untouched base aside."""
    if slot.absorbed:
        raise LorakitError(f"adapter `{slot.absorbed.adapter}` already changed this base; two such starts disagree about it. "
                           "Mend: storage: offset, which leaves the base alone")
    site, kept = slot.site, slot.site.store.take()
    W = Base(site).weight()
    p0 = {k: v.to(W.device) for k, v in p0.items()}
    site.store.write(site.unview(W - (each(site, core, core.weight, p0, W) - W)))
    slot.absorbed = Absorbed(name, core, p0, kept)


def _strip(modules: Mapping[str, nn.Module], name: str, on: Mapping[str, Slot]) -> None:
    """Takes an adapter off these slots, which may have been given it only in part."""
    for path, slot in on.items():
        for leaf in slot.methods[name].leaves if name in slot.methods else ():
            attr = slot.attr(name, leaf)
            holder = slot.module._modules.get(attr)
            if holder is not None:
                holder._parameters.pop(name, None)
                if not holder._parameters:
                    del slot.module._modules[attr]
        for table in (slot.methods, slot.dropout, slot.tied):
            table.pop(name, None)
        if slot.absorbed and slot.absorbed.adapter == name:
            slot.site.store.put(slot.absorbed.kept)
            slot.absorbed = None
        if not slot.methods:
            unhost(modules, place(modules, path))


def delete(model: nn.Module, name: str) -> None:
    """Takes one adapter off. With the last one gone the model is what it was before the first."""
    state = known(model, [name])
    if state.merged is not None:
        raise LorakitError(f"adapters {sorted(state.merged)} are merged into the base; mend: lorakit.unmerge(model) first")
    _strip(dict(model.named_modules()), name, slots(model, name))
    del state.specs[name]
    state.active.pop(name, None)
    if not state.specs:
        for n, p in model.named_parameters(remove_duplicate=False):
            p.requires_grad_(n in state.required_grad)


@contextmanager
def tentative(model: nn.Module, name: str) -> Iterator[None]:
    """An adapter put on inside stays only if the block ends without an error; else it goes, and what was active is so again."""
    state = find_state(model)
    active, there = state.active if state else {}, bool(state) and name in state.specs
    try:
        yield
    except BaseException:
        now = find_state(model)
        if not there and now is not None and name in now.specs:
            delete(model, name)
        if state:
            state.active = active
        raise


def detach(model: nn.Module) -> nn.Module:
    """Takes every adapter off and gives back the very model: same objects, classes, weights, and what trained before."""
    state = state_of(model)
    if state.merged is not None:
        unmerge(model)
    for name in list(state.specs):
        delete(model, name)
    return model


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Writes the active adapters into the base weights (new weight objects; ties are left alone). `unmerge` undoes it to the bit.

    Raises if a merged weight is not finite, or two adapters' order would matter; the model is then as before.
    """
    state = state_of(model)
    if state.merged is not None:
        raise LorakitError(f"adapters {sorted(state.merged)} are merged already; mend: lorakit.unmerge(model) first")
    if not state.active:
        raise LorakitError("no adapter is active, so there is nothing to merge; mend: lorakit.activate(model, name)")
    done: list[Slot] = []
    try:
        for path, slot in slots(model).items():
            if not (slot.absorbed or any(a in slot.methods for a in state.active)):
                continue
            W, bias = slot.map(state.active).weight(), slot.bias(state.active)
            if not torch.isfinite(W).all():
                raise LorakitError(f"{path}: the merged weight is not finite (NaN or infinity in the adapter?); nothing was merged")
            slot.kept = (slot.site.store.take(), slot.site.bias)
            done.append(slot)
            slot.site.store.write(slot.site.unview(W))
            if bias is not slot.site.bias:
                slot.site.put_bias(nn.Parameter(bias.detach().to(slot.site.dtype).clone(), requires_grad=False))
        for slot in done:
            _keep_tied(slot, done)
    except BaseException:
        _put_back(done)
        raise
    state.merged, state.active = state.active, {}


def _keep_tied(slot: Slot, done: Iterable[Slot]) -> None:
    """Two weights that were one object and got the same update are one object again."""
    sources = {id(s): s for s in slot.tied.values()}
    source = next(iter(sources.values())) if len(sources) == 1 else None
    mine = set(slot.state.active) & set(slot.methods)
    if source in done and source.kept[0] is slot.kept[0] and mine == set(slot.tied) & mine == set(slot.state.active) & set(source.methods):
        slot.site.store.put(source.site.store.take())


def _put_back(done: Iterable[Slot]) -> None:
    for slot in done:
        weight, bias = slot.kept
        slot.site.store.put(weight)
        if slot.site.bias is not bias:
            slot.site.put_bias(bias)
        slot.kept = None


def unmerge(model: nn.Module) -> None:
    """Puts the untouched base weights back: the very objects, so bitwise."""
    state = state_of(model)
    if state.merged is None:
        raise LorakitError("nothing is merged, so there is nothing to unmerge")
    _put_back(s for s in slots(model).values() if s.kept)
    state.active, state.merged = state.merged, None


def unload(model: nn.Module) -> nn.Module:
    """After `merge`: drops the adapters and keeps the merged weights, as a plain model."""
    state = state_of(model)
    if state.merged is None:
        raise LorakitError("nothing is merged; mend: lorakit.merge(model) first, or lorakit.detach(model) to get the base back")
    modules = dict(model.named_modules())
    for slot in slots(model).values():
        slot.kept = slot.absorbed = None
    for name in list(state.specs):
        _strip(modules, name, slots(model, name))
    for n, p in model.named_parameters(remove_duplicate=False):
        p.requires_grad_(n in state.required_grad)
    return model
