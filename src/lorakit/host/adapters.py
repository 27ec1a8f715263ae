"""Puts adapters on a model, all or nothing, takes them off, merges them and puts the base back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.host.hooked import change_class, check_blocks
from lorakit.host.module import find_state, host, host_class, known, slots, state_of, unhost, walk
from lorakit.host.slot import Absorbed, Slot, State, Unmerged, Written
from lorakit.maps import Base, each
from lorakit.method import Around, Method, Origin, Params
from lorakit.sites import Site, place, site_for
from lorakit.stores.shards import GROWS, scattered


def generator(seed: int, path: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the layer's path alone, not on the order or number of targets."""
    word = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(word[:7], "big"))


StartFn = Callable[[str, Method, Params, Origin, torch.Generator], Tensor | None]  # the target's path …; what a quantised base is to keep of the weight


def _device(site: Site) -> torch.device:
    device = site.store.device
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
    modules, ties = dict(walk(model)), ties or {}
    state = find_state(model)
    first, state = state is None, state or State()
    if name in state.specs:
        raise LorakitError(f"the model already has an adapter `{name}`; mend: another name, or lorakit.delete(model, {name!r}) first")
    if state.merged is not None:
        raise LorakitError(f"adapters {sorted(state.merged)} are merged into the base; mend: lorakit.unmerge(model) first")
    if not empty and any(scattered(t) for m in modules.values() for t in m._parameters.values()):
        raise LorakitError(GROWS.format("adapt"))
    check_blocks(modules, plan)
    if first:
        state.required_grad = frozenset(n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)
    done: dict[str, Slot] = {}
    try:
        for path, method in sorted(plan.items(), key=lambda kv: kv[0] in ties):
            slot = done[path] = host(modules, state, path)
            slot.methods[name], slot.dropout[name] = method, dropout
            if why := _astray(method, slot.site) or method.unfit(slot.site):
                raise LorakitError(f"{path or 'the model'}: {why}")
        bank = _bank(done, name, seed, freeze)
        for path, slot in done.items():
            method = slot.methods[name]
            if path in ties:
                _tie(slot, name, done[ties[path]])
            else:
                with _at(path):
                    _fill(slot, name, method, bank, start and partial(start, path), absorb, generator(seed, path), freeze, empty)
    except BaseException:
        _strip(modules, name, done)
        raise
    for n, p in model.named_parameters() if first else ():
        p.requires_grad_(p.requires_grad and n not in state.required_grad)
    state.specs[name] = spec
    return state


Bank = Mapping[tuple[str, str], nn.Parameter]  # (leaf, group of targets) -> the one tensor they share


def _astray(method: Method, site: Site) -> str | None:
    """Why a method for layers has no place around a module."""
    if site.whole and not isinstance(method, Around):
        return f"{method.name} is for layers and parameters, and this is a whole {type(site.module).__name__}; mend: name the layers inside it"
    return None


def _bank(slots: Mapping[str, Slot], name: str, seed: int, freeze: tuple[str, ...]) -> Bank:
    """Leaves that several targets share: each one Parameter, at the largest size any of them needs."""
    shared: dict[tuple[str, str], tuple[Method, list[int]]] = {}
    keep, device = torch.float32, None
    for slot in slots.values():
        method = slot.methods[name]
        for k, s in slot.shapes(name).items():
            if method.leaves[k].shared:
                keep, device = torch.promote_types(keep, slot.site.dtype), device or _device(slot.site)
                at = k, slot.group(name, k)
                shared[at] = (method, [max(a, b) for a, b in zip(s, shared.get(at, (method, s))[1], strict=True)])
    gens: dict[int, torch.Generator] = {}
    out = {}
    for (k, group), (m, s) in shared.items():
        number = seed if m.shared_seed is None else m.shared_seed
        gen = gens.setdefault(number, torch.Generator().manual_seed(number))
        value = m.leaves[k].start(s, m.owner(k), Origin(None), gen)
        out[k, group] = nn.Parameter(value.to(device, keep), m.leaves[k].trains and k not in freeze)
    return out


@contextmanager
def _at(path: str) -> Iterator[None]:
    """An error inside says at which target."""
    try:
        yield
    except LorakitError as e:
        raise LorakitError(str(e) if path in str(e) else f"{path}: {e}") from None


def _tie(slot: Slot, name: str, source: Slot) -> None:
    slot.tied[name], slot.dropout[name] = source, 0.0
    for leaf, p in source.parameters(name).items():
        slot.put(name, leaf, p)


def _fill(slot: Slot, name, method: Method, bank, start, absorb, gen, freeze, empty) -> None:
    site, device = slot.site, _device(slot.site)
    keep = torch.promote_types(site.dtype, torch.float32)  # adapters never live below float32
    keep = keep if site.dtype.is_floating_point else site.dtype  # but a counter stays one
    mine = {k: bank[k, slot.group(name, k)] for k, leaf in method.leaves.items() if leaf.shared and k in slot.shapes(name)}
    p = _begin(slot, name, method, mine, start, absorb, gen, empty or device.type == "meta")
    for k, v in p.items():
        trains = method.leaves[k].trains and k not in freeze
        slot.put(name, k, mine[k] if k in mine else nn.Parameter(v.to(device, keep).contiguous(), trains))


def _begin(slot: Slot, name: str, method: Method, mine: Params, start, absorb: bool, gen: torch.Generator, empty: bool) -> Params:
    """The leaves at their start, on the CPU in float32; every matrix of a stack has its own. mine: those shared with other targets.

    empty: nothing but what is derived from the base is set.
    """
    site = slot.site
    base = slot.map(slot.state.active) if slot.state.chained else Base(site)  # around those in effect, or around the target
    whole: list[Tensor] = []  # the base, read once and only if something asks

    def origin(n: int) -> Origin:
        def W() -> Tensor:
            whole[:] = whole or [base.weight().to("cpu", torch.float32)]
            return whole[0][n] if site.stack else whole[0]

        bias = None if site.bias is None else site.bias.to("cpu")
        return Origin(W, bias[n] if bias is not None and site.stack else bias, site.lookup)

    def before(n: int) -> Origin:  # what a start of the weight is made of
        if not site.store.packs:
            return origin(n)
        return Origin(lambda: _original(site), None, site.lookup, lambda M: site.rounded(M.to(site.store.device)).cpu(),
                      site.store.original() is not None)

    many = range(site.stack[0] if site.stack else 1)
    shapes = method.shapes(site.out, site.in_, site.bias is not None)
    corner = {k: t.detach()[tuple(slice(n) for n in shapes[k])].to("cpu", torch.float32) for k, t in mine.items()} if not empty else {}
    p = [{k: torch.empty(s) for k, s in shapes.items()} if empty else method.start(site.out, site.in_, origin(n), gen, corner) for n in many]
    for n in many if any(leaf.derived for leaf in method.leaves.values()) and _device(site).type != "meta" else ():
        method.derive(p[n], origin(n))
    if empty:
        return _stacked(method, p, site)
    rest = [start(method.core, p[n], before(n), gen) for n in many] if start else []
    if absorb:
        p0 = _stacked(method, [{k: q[k].clone() for k in method.core.leaves if k in q} for q in p], site)
        if site.store.packs:
            _repack(slot, name, method.core, p0, rest[0])
        else:
            absorb_start(slot, name, method.core, p0)
        whole.clear()
    for n in many:
        method.settle(p[n], origin(n))
    return _stacked(method, p, site)


def _stacked(method: Method, p: list[Params], site: Site) -> Params:
    return {k: torch.stack([q[k] for q in p]) if site.stack and not method.leaves[k].shared else p[0][k] for k in p[0]}


def _original(site: Site) -> Tensor:
    """The matrix from before it was quantised, where that is known; else what it stands for. float32, on the CPU."""
    W = site.store.original()
    return site.view(site.store.read() if W is None else W).to("cpu", torch.float32)


@torch.no_grad()
def _repack(slot: Slot, name: str, core: Method, p0: Params, rest: Tensor | None) -> None:
    """base := the original matrix less what the start holds of it (or `rest`), quantised again. It stays so until the adapter goes."""
    site = slot.site
    if slot.repacked:
        raise LorakitError(f"adapter `{slot.repacked[0]}` already changed this base; two such starts disagree about it. Mend: another start")
    slot.repacked = name, site.store.take()
    if rest is None:
        W = _original(site)
        rest = W - (core.weight(p0, W) - W)
    site.store.write(site.unview(rest))


@torch.no_grad()
def absorb_start(slot: Slot, name: str, core: Method, p0: Params) -> None:
    """base := base - delta(p0), keeping the untouched base aside."""
    if slot.absorbed:
        raise LorakitError(f"adapter `{slot.absorbed.adapter}` already changed this base; two such starts disagree about it. "
                           "Mend: storage: offset, which leaves the base alone")
    _absorb(slot, name, core, p0)


@torch.no_grad()
def absorb(slot: Slot, name: str, undo: Method, p: Params, written: Written) -> None:
    """base := untouched base - delta(p), in place of what this adapter took in before; written: how the adapter is then saved.

    The change is made anew on the untouched base each time, so that roundings do not add up.
    """
    site, before = slot.site, slot.absorbed
    if before and (before.adapter != name or before.written is None):
        raise LorakitError(f"{slot.path}: the start of adapter `{before.adapter}` already changed this base, so nothing more can be taken into it; mend: "
                           "storage: offset, or a start that is zero")
    if not site.store.writable or site.store.eps:
        raise LorakitError(f"{slot.path}: its weight is quantised, so what is taken into it would be rounded away; mend: a base that is not quantised")
    give_back(slot, name)
    _absorb(slot, name, undo, p, written)


def give_back(slot: Slot, name: str) -> None:
    """Takes out of the base what `absorb` took in: the very weight from before."""
    if slot.absorbed and slot.absorbed.adapter == name and slot.absorbed.written:
        slot.site.store.put(slot.absorbed.kept)
        slot.absorbed = None


def _absorb(slot: Slot, name: str, core: Method, p0: Params, written: Written | None = None) -> None:
    site, kept = slot.site, slot.site.store.take()
    W = Base(site).weight()
    p0 = {k: v.to(W.device) for k, v in p0.items()}
    site.store.write(site.unview(W - (each(site, core, core.weight, p0, W) - W)))
    slot.absorbed = Absorbed(name, core, p0, kept, written)


@torch.no_grad()
def restart(slot: Slot, name: str, gen: torch.Generator) -> None:
    """The leaves of the innermost method at their own start again, in place; those that wrappers add stay."""
    core = slot.methods[name].core
    p = _begin(slot, name, core, {}, None, False, gen, False)
    for k, t in slot.parameters(name).items():
        if k in p:
            t.copy_(p[k])


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
        if slot.repacked and slot.repacked[0] == name:
            slot.site.store.put(slot.repacked[1])
            slot.repacked = None
        if not slot.methods:
            unhost(modules, place(modules, path))


def delete(model: nn.Module, name: str) -> None:
    """Takes one adapter off. With the last one gone the model is what it was before the first."""
    state = known(model, [name])
    if state.merged is not None:
        raise LorakitError(f"adapters {sorted(state.merged)} are merged into the base; mend: lorakit.unmerge(model) first")
    modules, there = dict(walk(model)), slots(model, name)
    for path, slot in there.items():
        module = modules[place(modules, path).owner]
        if set(slot.methods) == {name} and type(module) is not host_class(module.own_class, module.mixin):
            raise LorakitError(f"{path} is itself spread over processes (FSDP), which made another class of it, so its last adapter cannot come off; "
                               "mend: lorakit.activate(model), which leaves the base alone in effect, or load the base anew")
    _strip(modules, name, there)
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
def merge(model: nn.Module, write: Callable[[Slot, Tensor], None] | None = None) -> None:
    """Writes the active adapters into the base weights (new weight objects; ties are left alone). `unmerge` undoes it to the bit.

    write: (slot, merged matrix), what to do with one; by default `thaw`. Raises if a merged weight is not finite, or two adapters' order would
    matter; the model is then as before.
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
            for a in state.active:
                if a in slot.methods and isinstance(slot.methods[a], Around):
                    raise LorakitError(f"adapter `{a}`: {slot.methods[a].name} changes no weight, so there is nothing to merge it into; nothing was. "
                                       "Mend: keep it as an adapter, or activate the others alone")
                if a in slot.methods and slot.methods[a].mergeable == "no":
                    raise LorakitError(f"{path}: {slot.methods[a].core.name} (adapter `{a}`) depends on its input, so it cannot be merged; nothing was. "
                                       "Mend: keep it as an adapter, or activate the others alone")
            W, bias = slot.map(state.active).weight(), slot.bias(state.active)
            if not torch.isfinite(W).all():
                raise LorakitError(f"{path}: the merged weight is not finite (NaN or infinity in the adapter?); nothing was merged")
            slot.kept = Unmerged(slot.site.store.take(), slot.site.bias, slot.site, type(slot.site.module))
            done.append(slot)
            (write or thaw)(slot, W)
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
    if source in done and source.kept.weight is slot.kept.weight and mine == set(slot.tied) & mine == set(slot.state.active) & set(source.methods):
        slot.site.store.put(source.site.store.take())


def thaw(slot: Slot, W: Tensor) -> None:
    """Writes a merged weight; a quantised one becomes an ordinary parameter, so that nothing of it is rounded away."""
    site, module, plain = slot.site, slot.site.module, slot.site.store.plain
    site.store.thaw(site.unview(W))
    if plain is not None:
        change_class(module, host_class(plain, module.mixin))
        slot.site = site_for(module)


def _put_back(done: Iterable[Slot]) -> None:
    for slot in done:
        was = slot.kept
        if was.site is not slot.site:
            change_class(was.site.module, was.cls)
            slot.site = was.site
        slot.site.store.put(was.weight)
        if slot.site.bias is not was.bias:
            slot.site.put_bias(was.bias)
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
        slot.kept = slot.absorbed = slot.repacked = None
    for name in list(state.specs):
        _strip(modules, name, slots(model, name))
    for n, p in model.named_parameters(remove_duplicate=False):
        p.requires_grad_(n in state.required_grad)
    return model
