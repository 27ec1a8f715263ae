"""What hosting adds to one target, and what all targets of a model share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.kernels.dropout import Dropout
from lorakit.kernels.segments import Layout, layout, stacked
from lorakit.maps import Affine, After, Applied, Base, Grouped, Map, Once, PerRow, Sum, same, spread
from lorakit.method import Method, Params, Part
from lorakit.sites import NO_ROWS, Call, Site
from lorakit.stores.dense import held


@dataclass
class State:
    """What all hosted layers of one model share."""

    specs: dict[str, Any] = field(default_factory=dict)  # adapter -> how it was made, for saving
    active: dict[str, float] = field(default_factory=dict)  # adapter -> weight, in order
    chained: bool = False  # each adapter around the one before it, instead of a sum over one base
    given: dict[str, Tensor] = field(default_factory=dict)  # what methods ask of the batch beside the input, for its rows
    rows: tuple[tuple[str, ...], Tensor] | None = None  # mixed batch: names, and for each row an index into them or -1
    plans: tuple[Any, dict[Any, Any]] = field(default_factory=lambda: (None, {}))  # what is worked out once for `rows`
    merged: dict[str, float] | None = None  # what is merged into the base now
    required_grad: frozenset[str] = frozenset()  # base parameters that trained before the first adapter came
    own_base: str = ""  # where the base was saved that a start made anew
    prints: tuple[Any, Any] | None = None  # the base's fingerprint, and what it was taken of


class Leaves(nn.Module):
    """The tensors that several adapters keep under one leaf name on one layer. They are read; the module itself is never called."""

    def __setattr__(self, name: str, value: Any) -> None:
        """accelerate's hooks send a module's tensors away until it is called: these follow to the hook's device, and stay."""
        if name == "_old_forward":  # before they go
            self.__dict__["_here"] = dict(self._parameters)
        elif name == "_hf_hook":  # they are gone
            device = getattr(value, "execution_device", None)
            for k, p in self.__dict__.pop("_here", {}).items():
                p.data = p.data if device is None else p.data.to(device)
                self._parameters[k] = p
        elif name != "forward":
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}: {tuple(v.shape)}" for k, v in self._parameters.items())


class Holder(nn.Module):
    """Carries the leaves of a parameter's adapters, as a child of the module that reads the parameter."""


Written = Callable[["Slot", Method, Params], tuple[Method, Params]]  # an adapter and its leaves, as they say all of it on the untouched base


@dataclass
class Absorbed:
    """What an adapter changed of the base weight in memory: core with p0 makes the untouched one of it; `kept` puts that back to the bit.

    It is a start that was taken out, or, with `written`, what training has taken in so far.
    """

    adapter: str
    core: Method
    p0: Params
    kept: object
    written: Written | None = None


@dataclass(frozen=True)
class Unmerged:
    """What merging replaced on one target."""

    weight: object  # as the store takes it
    bias: Tensor | None
    site: Site
    cls: type[nn.Module]


class Slot:
    """What hosting adds to one target: its geometry and the adapters on it. The tensors are children of `module`, the layer or a Holder."""

    def __init__(self, module: nn.Module, site: Site, state: State, path: str = ""):
        self.module, self.site, self.state, self.path = module, site, state, path
        self.methods: dict[str, Method] = {}
        self.dropout: dict[str, float] = {}
        self.tied: dict[str, Slot] = {}  # adapter -> the slot whose very tensors it has here
        self.absorbed: Absorbed | None = None
        self.repacked: tuple[str, object] | None = None  # the adapter whose start a quantised base makes room for, and the base before
        self.kept: Unmerged | None = None  # the base, while merged

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
        own = next((t for leaf, t in out.items() if not leaves[leaf].shared), None)
        for leaf, t in out.items():
            if leaves[leaf].shared:
                t = t[tuple(slice(n) for n in self.shapes(adapter)[leaf])]
                out[leaf] = t if own is None else t.to(own.device)  # the targets may live on several devices
        for name in self.methods[adapter].asks:
            if name in self.state.given:
                out[name] = self.state.given[name]
        return out

    def first(self, adapter: str) -> Params:
        """The leaves of one matrix: all of them, or the first of a stack."""
        leaves = self.methods[adapter].leaves
        return {k: t[0] if self.site.stack and not leaves[k].shared else t for k, t in self.params(adapter).items()}

    def whole(self, adapter: str) -> Params:
        """The values of the adapter's tensors on this layer as they are stored, a shared one whole."""
        return {leaf: held(holder, adapter) for leaf, holder in self.holders(adapter).items()}

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The very parameters, of which a process may hold only a part."""
        return {leaf: holder._parameters[adapter] for leaf, holder in self.holders(adapter).items()}

    def holders(self, adapter: str) -> dict[str, nn.Module]:
        """Leaf -> the child that holds it."""
        there = {leaf: self.module._modules.get(self.attr(adapter, leaf)) for leaf in self.methods[adapter].leaves}
        return {leaf: holder for leaf, holder in there.items() if holder is not None and adapter in holder._parameters}

    def shapes(self, adapter: str) -> dict[str, list[int]]:
        method, site = self.methods[adapter], self.site
        return {k: s if method.leaves[k].shared else [*site.stack, *s] for k, s in method.shapes(site.out, site.in_, site.bias is not None).items()}

    def saved(self, adapter: str) -> list[str]:
        """The leaves that belong in a file."""
        return [k for k in self.shapes(adapter) if not self.methods[adapter].leaves[k].derived]

    def group(self, adapter: str, leaf: str) -> str:
        """Which targets this one shares a leaf with: "" for all of the model, else what they have in common, as a part of the leaf's key."""
        return self.group_of(self.methods[adapter], leaf)

    def group_of(self, method: Method, leaf: str) -> str:
        how, size = method.leaves[leaf].shared, f"{self.site.out}x{self.site.in_}"
        return {"model": "", "shape": size, "name": f"{self.path.rpartition('.')[2]}_{size}"}[how]

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
        return Dropout(p) if p and self.module.training and self.site.drops else same

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
        """What the layer computes: map and bias, then the serial adapters."""
        behind = [a for a in active if a in self.methods and self.methods[a].last]
        call = self._affine({a: g for a, g in active.items() if a not in behind}, self.bias(active))
        return After(call, [self.applied(a, None, active[a]) for a in behind], self.state.chained) if behind else call

    def _affine(self, active: Mapping[str, float], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Map and bias; where every adapter only adds to the base's output, the base's own kernel adds the bias."""
        if all(self.methods[a].adds for a in active if a in self.methods):
            return self.map(active, bias)
        return Affine(self.map(active), self.site, bias)

    def call(self) -> Callable[[Tensor], Tensor]:
        if self.state.rows is None:
            return self.affine(self.state.active)
        names, index = self.state.rows
        self.check_rows()
        if self.state.given and any(self.methods[n].asks for n in names if n in self.methods):
            raise LorakitError(f"{self.path}: a mixed batch cannot also be given {', '.join(self.state.given)}; mend: one batch for each adapter")
        if self._thin(names):
            drop = next((self.drop(n) for n in names if n in self.methods), same)
            return Grouped(self.affine({}), self._layout, self._factors, drop, len(index))
        return PerRow(self.affine({}), [self.affine({n: 1.0}) for n in names], index, self.path)

    @torch.no_grad()  # asked once, so that nothing of it may be in a graph that is computed again
    def _thin(self, names: tuple[str, ...]) -> bool:
        """Whether each of these adapters does no more here than add one thin product to what the layer gives, and all drop as much."""
        site, here = self.site, [n for n in names if n in self.methods]
        if site.slides or site.lookup or site.stack or self.absorbed or torch.compiler.is_compiling():
            return False
        key = self.path, tuple(here), self.module.training
        known = self._plans()
        if key not in known:
            pairs = [(self.methods[n], self.params(n)) for n in here]
            known[key] = (not self.module.training or len({self.dropout.get(n, 0.0) for n in here}) <= 1) and all(
                m.adds and not m.last and m.two(p) is not None and m.bias(p, site.bias) is site.bias for m, p in pairs)
        return known[key]

    def _plans(self) -> dict[Any, Any]:
        """What is worked out once for a mixed batch."""
        if self.state.plans[0] is not self.state.rows:
            self.state.plans = self.state.rows, {}
        return self.state.plans[1]

    def _layout(self, n: int, device: torch.device) -> Layout:
        names, index = self.state.rows
        here = tuple(name in self.methods for name in names)
        key, known = (here, n, device), self._plans()
        if key not in known:
            known[key] = layout(spread(index, n, self.path), here, device)
        return known[key]

    def _factors(self, at: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The stacked factors; without gradients they are kept until a leaf changes."""
        key, known = (self.path, at.kinds, dtype), self._plans()
        if not torch.is_grad_enabled() and key in known:
            places, leaves, versions, made = known[key]
            now = [d.get(n) for d, n in places]
            if all(map(is_, now, leaves)) and [t._version for t in now] == versions:
                return made
        names = [self.state.rows[0][k] for k in at.kinds]
        made = stacked([self.methods[n].scaled(self.params(n)) for n in names], dtype)
        if not torch.is_grad_enabled():
            made = made[0].mT.contiguous().mT, made[1]  # of which one token's product reads whole rows
            places = [(h._parameters, n) for n in names for h in self.holders(n).values()]
            leaves = [d[n] for d, n in places]
            known[key] = places, leaves, [t._version for t in leaves], made
        return made

    def around(self, own: Callable[..., Any], call: Call) -> Any:
        """The module's answer to a call through the methods around it; the first of them is the innermost."""

        def inner(call: Call) -> Any:
            return own(**call.given)

        if self.state.rows is not None:
            return self._around_rows(*self.state.rows, inner, call)
        for a in sorted((a for a in self.state.active if a in self.methods), key=lambda a: not self.methods[a].inmost):
            if (g := self.state.active[a]) != 1.0:
                raise LorakitError(f"adapter `{a}`: {self.methods[a].name} is there or not, a weight of {g} means nothing; mend: weights of 1")
            inner = partial(self.methods[a].around, self.params(a), inner, site=self.site)
        return inner(call)

    def _around_rows(self, names: tuple[str, ...], index: Tensor, inner: Callable[[Call], Any], call: Call) -> Any:
        """The same of a mixed batch: every row through the method that its adapter has here."""
        here = [n for n in names if n in self.methods]
        mixed = self.methods[here[0]].mixed
        for n in here:
            if (own := self.methods[n].mixed) is None or own is not mixed:
                row = index.tolist().index(names.index(n))
                why = "changes what every row sees" if own is None else f"does not mix with {self.methods[here[0]].name}, which `{here[0]}` has"
                raise LorakitError(f"{self.path or 'the model'}: adapter `{n}` (row {row}): {self.methods[n].name} {why}; mend: one batch for each adapter")
        mine = torch.tensor([here.index(n) if n in here else -1 for n in names] + [-1])[index]  # -1, the base, is the last
        return mixed([Part(n, self.methods[n], self.params(n)) for n in here], mine, inner, call, self.site)

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
