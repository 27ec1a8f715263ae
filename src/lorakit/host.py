"""Puts adapters on a model in place and takes them off again. Knows no method, no layer type, no dtype.

A hosted layer keeps its name, its place and its identity: its class becomes one made from its own, its base keys and ties
stay, `isinstance` stays true, and `detach` gives back the very object. One `State` per model says which adapters are
active; every hosted layer points at it, so switching is one assignment and not a walk over modules.
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
from lorakit.maps import Affine, Applied, Base, Map, Once, PerRow, Sum, same
from lorakit.method import Method, Origin, Params
from lorakit.sites import Site, check_caller, site_for
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


@dataclass
class Absorbed:
    """An adapter whose start was taken out of the base weight; `kept` puts the untouched base back."""

    adapter: str
    core: Method
    p0: Params
    kept: object


class Slot:
    """What hosting adds to one layer: its geometry and the adapters on it. The tensors are the layer's own children."""

    def __init__(self, module: nn.Module, site: Site, state: State):
        self.module, self.site, self.state = module, site, state
        self.methods: dict[str, Method] = {}
        self.dropout: dict[str, float] = {}
        self.absorbed: Absorbed | None = None
        self.kept: tuple[object, nn.Parameter | None] | None = None  # the base, while merged

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

    def whole(self, adapter: str) -> Params:
        """The adapter's tensors on this layer as they are stored, a shared one whole."""
        out = {}
        for leaf in self.methods[adapter].leaves:
            holder = self.module._modules.get(self.attr(adapter, leaf))
            if holder is not None and adapter in holder._parameters:
                out[leaf] = held(holder, adapter)
        return out

    def shapes(self, adapter: str) -> dict[str, list[int]]:
        return self.methods[adapter].shapes(self.site.out, self.site.in_, self.site.bias is not None)

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
                b = b if new is begun else b + (new - begun) * g
        return b

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
        return PerRow(self.affine({}), [self.affine({n: 1.0}) for n in names], index)

    def idle(self) -> bool:
        """Whether the layer's own forward is the answer."""
        s = self.state
        wanted = s.active if s.rows is None else s.rows[0]
        return not (self.absorbed and s.merged is None) and not any(a in self.methods for a in wanted)


class Host:
    """Mixed into a layer's class at run time (`class AdaptedLinear(Host, Linear)`)."""

    slot: Slot

    def forward(self, *args, **kwargs):
        if self.slot.idle():
            return super().forward(*args, **kwargs)
        x, *more = (*args, *kwargs.values())  # the input may come by name
        if more:
            raise LorakitError(f"{type(self).__name__} was called with more than its input; an adapter would ignore the rest")
        return self.slot.call()(x)

    def __reduce_ex__(self, protocol):
        return _rebuild, (type(self).__mro__[2],), self.__dict__


def _rebuild(cls: type) -> nn.Module:
    new = host_class(cls)
    return new.__new__(new)


@cache
def host_class(cls: type) -> type:
    """`class Adapted<Name>(Host, <Name>)`, one for each layer class."""
    return type(f"Adapted{cls.__name__}", (Host, cls), {"__module__": __name__})


def host(module: nn.Module, state: State, path: str = "") -> Slot:
    """Makes a layer a host, or returns the slot it already has."""
    if isinstance(module, Host):
        return module.slot
    hooked = "_old_forward" in vars(module)  # accelerate wrapped it first: its hook must call us, not the old class
    if "forward" in vars(module) and not hooked:
        raise LorakitError(f"{path or 'this layer'}: its forward was replaced on the instance (by another library?), so an adapter "
                           "would be skipped silently; mend: adapt the model first, or undo that replacement")
    site = site_for(module, path)
    module.__class__ = host_class(type(module))
    if hooked:
        module._old_forward = MethodType(Host.forward, module)
    module.__dict__["slot"] = Slot(module, site, state)
    return module.slot


def unhost(module: nn.Module) -> None:
    """Gives the layer its own class back."""
    slot = module.__dict__.pop("slot")
    if slot.absorbed:
        slot.site.store.put(slot.absorbed.kept)
    module.__class__ = type(module).__mro__[2]
    if "_old_forward" in vars(module):
        module._old_forward = MethodType(type(module).forward, module)


def slots(model: nn.Module, adapter: str | None = None) -> dict[str, Slot]:
    """Path -> slot of every hosted layer, or of those that have this adapter."""
    every = {n: m.slot for n, m in model.named_modules() if isinstance(m, Host)}
    return every if adapter is None else {n: s for n, s in every.items() if adapter in s.methods}


def state_of(model: nn.Module) -> State:
    """The model's shared state. LorakitError if it has no adapter."""
    for m in model.modules():
        if isinstance(m, Host):
            return m.slot.state
    raise LorakitError(f"this {type(model).__name__} has no adapters; mend: lorakit.adapt(model, ...) or lorakit.load(model, path)")


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


def _device(module: nn.Module, site: Site) -> torch.device:
    device = site.store.read().device
    hook = getattr(module, "_hf_hook", None)  # offloaded by accelerate: the weight is on meta, the work is done elsewhere
    where = getattr(hook, "execution_device", None)
    return torch.device(where) if device.type == "meta" and where is not None else device


@torch.no_grad()
def attach(model: nn.Module, name: str, plan: Mapping[str, Method], spec: Any, *, dropout: float = 0.0, freeze: tuple[str, ...] = (),
           start: StartFn | None = None, absorb: bool = False, seed: int = 0, empty: bool = False) -> State:
    """Puts one adapter, a method for each path, on the model. All or nothing: on an error the model is as before.

    start: sets leaves away from their own start. absorb: takes delta(start) out of the base. empty: leaves stay unset
    (about to be loaded). The base is frozen; leaves are at least float32 and live where their layer's weight lives.
    """
    if not name or "." in name:
        raise LorakitError(f"an adapter's name is one word without dots, not {name!r}")
    modules = dict(model.named_modules())
    first = not any(isinstance(m, Host) for m in modules.values())
    state = State() if first else state_of(model)
    if name in state.specs:
        raise LorakitError(f"the model already has an adapter `{name}`; mend: another name, or lorakit.delete(model, {name!r}) first")
    if state.merged is not None:
        raise LorakitError(f"adapters {sorted(state.merged)} are merged into the base; mend: lorakit.unmerge(model) first")
    if first:
        state.required_grad = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
    done: list[str] = []
    try:
        bank = _bank(modules, plan, seed, freeze)
        for path, method in plan.items():
            module = modules[path]
            done.append(path)
            check_caller(modules.get(path.rpartition(".")[0]), path)
            slot = host(module, state, path)
            slot.methods[name], slot.dropout[name] = method, dropout
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
        module = modules[path]
        site = module.slot.site if isinstance(module, Host) else site_for(module, path)
        keep, device = torch.promote_types(keep, site.dtype), device or _device(module, site)
        for k, s in method.shapes(site.out, site.in_).items():
            if method.leaves[k].shared:
                shared[k] = (method, [max(a, b) for a, b in zip(s, shared.get(k, (method, s))[1], strict=True)])
    gen = torch.Generator().manual_seed(seed)
    return {k: nn.Parameter(m.leaves[k].start(s, m.owner(k), Origin(None), gen).to(device, keep), m.leaves[k].trains and k not in freeze)
            for k, (m, s) in shared.items()}


def _fill(slot: Slot, name, method: Method, bank, start, absorb, gen, freeze, empty) -> None:
    site, module = slot.site, slot.module
    device = _device(module, site)
    base = slot.map(slot.state.active) if slot.state.chained else Base(site)  # around those in effect, or around the layer
    origin = Origin(lambda: base.weight().to("cpu", torch.float32), None if site.bias is None else site.bias.to("cpu"), site.lookup)
    keep = torch.promote_types(site.dtype, torch.float32)  # adapters never live below float32
    if empty or device.type == "meta":
        p = {k: torch.empty(s) for k, s in slot.shapes(name).items()}
    else:
        p = method.start(site.out, site.in_, origin, gen)
        if start:
            start(method.core, p, origin, gen)
        if absorb:
            _absorb(slot, name, method.core, {k: p[k].clone() for k in method.core.leaves})
        method.settle(p, origin)
    for k, v in p.items():
        trains = method.leaves[k].trains and k not in freeze
        slot.put(name, k, bank[k] if k in bank else nn.Parameter(v.to(device, keep).contiguous(), trains))


@torch.no_grad()
def _absorb(slot: Slot, name: str, core: Method, p0: Params) -> None:
    """base := base - delta(p0), keeping the untouched base aside."""
    if slot.absorbed:
        raise LorakitError(f"adapter `{slot.absorbed.adapter}` already changed this base; two such starts disagree about it. "
                           "Mend: storage: offset, which leaves the base alone")
    site, kept = slot.site, slot.site.store.take()
    W = Base(site).weight()
    p0 = {k: v.to(W.device) for k, v in p0.items()}
    site.store.write(site.unview(W - (core.weight(p0, W) - W)))
    slot.absorbed = Absorbed(name, core, p0, kept)


def _strip(modules: Mapping[str, nn.Module], name: str, paths: Iterable[str]) -> None:
    for path in paths:
        module = modules[path]
        if not isinstance(module, Host):
            continue
        slot = module.slot
        if name in slot.methods:
            for leaf in slot.methods[name].leaves:
                attr = slot.attr(name, leaf)
                holder = module._modules.get(attr)
                if holder is not None:
                    holder._parameters.pop(name, None)
                    if not holder._parameters:
                        del module._modules[attr]
            del slot.methods[name], slot.dropout[name]
        if slot.absorbed and slot.absorbed.adapter == name:
            slot.site.store.put(slot.absorbed.kept)
            slot.absorbed = None
        if not slot.methods:
            unhost(module)


def delete(model: nn.Module, name: str) -> None:
    """Takes one adapter off. With the last one gone the model is what it was before the first."""
    state = known(model, [name])
    if state.merged is not None:
        raise LorakitError(f"adapters {sorted(state.merged)} are merged into the base; mend: lorakit.unmerge(model) first")
    modules = dict(model.named_modules())
    _strip(modules, name, [n for n, m in modules.items() if isinstance(m, Host) and name in m.slot.methods])
    del state.specs[name]
    state.active.pop(name, None)
    if not state.specs:
        for n, p in model.named_parameters():
            p.requires_grad_(n in state.required_grad)


@contextmanager
def tentative(model: nn.Module, name: str) -> Iterator[None]:
    """An adapter put on inside stays only if the block ends without an error; else it goes, and what was active is so again."""
    state = next((m.slot.state for m in model.modules() if isinstance(m, Host)), None)
    active, there = state.active if state else {}, bool(state) and name in state.specs
    try:
        yield
    except BaseException:
        if not there and any(name in m.slot.state.specs for m in model.modules() if isinstance(m, Host)):
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
                slot.module.bias = nn.Parameter(bias.detach().to(slot.site.bias.dtype).clone(), requires_grad=False)
    except BaseException:
        _put_back(done)
        raise
    state.merged, state.active = state.active, {}


def _put_back(done: Iterable[Slot]) -> None:
    for slot in done:
        weight, bias = slot.kept
        slot.site.store.put(weight)
        if bias is not None and slot.module.bias is not bias:
            slot.module.bias = bias
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
        _strip(modules, name, [n for n, m in modules.items() if isinstance(m, Host) and name in m.slot.methods])
    for n, p in model.named_parameters():
        p.requires_grad_(n in state.required_grad)
    return model
