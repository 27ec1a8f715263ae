"""Makes modules hosts, in place: a layer that is called, or a module that reads parameters; finds the slots of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial, update_wrapper
from typing import Any

from torch import nn

from lorakit.errors import LorakitError, near
from lorakit.host.hooked import change_class, own_forwards
from lorakit.host.slot import Holder, Leaves, Slot, State
from lorakit.maps import groups, spread
from lorakit.sites import Place, batch_of, check_caller, place, site_at, whole_site
from lorakit.stores.saved import leanly


class Host:
    """Marks a module with adapters; mixed into its class at run time (`class AdaptedLinear(Layer, Linear)`)."""

    own_class: type  # what it was
    mixin: type  # Layer, Reader or Whole

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
        call = self.slot.call()
        return leanly(call)(x) if self.slot.site.store.packs else call(x)


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


class Whole(Host):
    """A module around whose call methods go: a model, an attention."""

    slot: Slot

    def forward(self, *args, **kwargs):
        if self.slot.idle():
            return super().forward(*args, **kwargs)
        return self.slot.around(super().forward, self.slot.site.bind(args, kwargs))


def _whole(cls: type) -> dict[str, Any]:
    """What else a class made from this one has: its own signature, which Trainer reads, and generation that knows of encoders called apart."""

    def forward(self, *args, **kwargs):
        return Whole.forward(self, *args, **kwargs)

    def generate(self, *args, **kwargs):
        if self.slot.idle() or not self.slot.site.pairs:
            return cls.generate(self, *args, **kwargs)
        return self.slot.around(partial(cls.generate, self), self.slot.site.bind_generate(args, kwargs))

    out = {"forward": update_wrapper(forward, cls.forward)}
    return out | ({"generate": update_wrapper(generate, cls.generate)} if hasattr(cls, "generate") else {})


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
    """`class Adapted<Name>(Layer, Reader or Whole, <Name>)`, one for each class."""
    more = _whole(cls) if mixin is Whole else {}
    return type(f"Adapted{cls.__name__}", (mixin, cls), {"__module__": __name__, "own_class": cls, "mixin": mixin} | more)


def _take_class(module: nn.Module, mixin: type, path: str) -> None:
    if "forward" in vars(module) and not own_forwards(module):
        raise LorakitError(f"{path or 'this layer'}: its forward was replaced on the instance (by another library?), so an adapter "
                           "would be skipped silently; mend: adapt the model first, or undo that replacement")
    change_class(module, host_class(type(module), mixin))


def host(modules: Mapping[str, nn.Module], state: State, path: str) -> Slot:
    """Makes the module at a target's place a host, or returns the slot the target already has."""
    at = place(modules, path)
    if at is None:
        raise LorakitError(f"the model has no module or parameter `{path}`{near(path, [n for n in modules if n])}")
    module = modules[at.owner]
    mixin = Reader if at.key else Whole if isinstance(module, Whole) or whole_site(module) else Layer
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
    slot = module.__dict__["slots"].pop(at.key) if at.key else module.__dict__.pop("slot")
    if slot.absorbed:
        slot.site.store.put(slot.absorbed.kept)
    if isinstance(slot.module, Holder):
        del module._modules[f"{at.key}_adapter"]
    if module.__dict__.get("slots"):
        return
    module.__dict__.pop("slots", None)
    change_class(module, module.own_class)


def slots_of(module: nn.Module, path: str = "") -> dict[str, Slot]:
    """Path -> slot of the targets of one module."""
    if not isinstance(module, Host):
        return {}
    if slot := module.__dict__.get("slot"):
        return {path: slot}
    return {f"{path}.{k}" if path else k: s for k, s in module.slots.items()}


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without what adapters put there, and without a generator for every level."""
    seen, todo = set(), [("", model)]
    while todo:
        path, module = todo.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module
            todo += [(f"{path}.{k}" if path else k, m) for k, m in reversed(module._modules.items()) if m is not None and not isinstance(m, Leaves | Holder)]


def slots(model: nn.Module, adapter: str | None = None) -> dict[str, Slot]:
    """Path -> slot of every target, or of those that have this adapter."""
    every = {p: s for n, m in walk(model) if isinstance(m, Host) for p, s in slots_of(m, n).items()}
    return every if adapter is None else {n: s for n, s in every.items() if adapter in s.methods}


def state_of(model: nn.Module) -> State:
    """The model's shared state. LorakitError if it has no adapter."""
    state = find_state(model)
    if state is None:
        raise LorakitError(f"this {type(model).__name__} has no adapters; mend: lorakit.adapt(model, ...) or lorakit.load(model, path)")
    return state


def bare(model: nn.Module, grows: str = "") -> nn.Module:
    """The model itself, out of a wrapper: PEFT's kind (`get_base_model`), torch.compile's, or data parallelism's.

    grows: the verb, where it adds tensors that train, which data parallelism must know when it wraps. LorakitError then.
    """
    cls = type(model)
    inner = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}.get(cls.__name__)
    if inner in model._modules:
        if grows and inner == "module":
            raise LorakitError(f"the model is inside a {cls.__name__}, which would not sum the gradients of new tensors; mend: "
                               f"lorakit.{grows}(model.module, ...) before it is wrapped")
        return bare(model._modules[inner])
    return cls.get_base_model(model) if hasattr(cls, "get_base_model") else model


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
