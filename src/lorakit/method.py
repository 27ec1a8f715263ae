"""The contract of a method (how one linear map becomes another), its partial implementations, and the registry.

A method holds hyper-parameters (frozen fields) and declares a table of leaves; the tensors come in as a dict `p`.
`weight` is the definition; `act` is a faster way to the same thing, and the conformance suite checks that they agree.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lorakit.errors import LorakitError, near
from lorakit.kernels.beside import beside, takes, thin
from lorakit.kernels.norms import row_norm_of_sum
from lorakit.maps import Map, same

Params = dict[str, Tensor]
Thunk = Callable[[], Tensor]
METHODS: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Origin:
    """What a leaf may start from: the base weight W (o, i), read only when called, and the layer's bias."""

    W: Thunk
    bias: Tensor | None = None
    lookup: bool = False  # the layer looks rows up (an embedding)
    rounded: Callable[[Tensor], Tensor] | None = None  # (o, i) as a quantised base would keep it; None: the base is not quantised
    known: bool = True  # W is the weight from before it was quantised

    def __call__(self) -> Tensor:
        return self.W()


# How a leaf starts: (shape, method, origin, generator) -> tensor, on the CPU in float32.
Start = Callable[[list[int], "Method", Origin, torch.Generator], Tensor]


def zeros(shape, method, origin, gen):
    return torch.zeros(shape)


def ones(shape, method, origin, gen):
    return torch.ones(shape)


def base_weight(shape, method, origin, gen):
    return origin().detach().clone()


def base_bias(shape, method, origin, gen):
    return origin.bias.detach().clone()


def normal(std: float) -> Start:
    return lambda shape, method, origin, gen: torch.randn(shape, generator=gen) * std


def kaiming(shape, method, origin, gen):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's `kaiming_uniform_(a=sqrt(5))`, as PEFT and loralib start A."""
    return (torch.rand(shape, generator=gen) * 2 - 1) * shape[-1] ** -0.5


def constant(name: str) -> Start:
    """The value of the method's field `name`."""
    return lambda shape, method, origin, gen: torch.full(shape, float(getattr(method, name)))


@dataclass(frozen=True)
class Leaf:
    """One tensor of a method.

    axes: names separated by spaces, `o`, `i`, or an int field of the method; the only source of its shape.
    key: its name in files, and (up to a final `.weight`) in `named_parameters()`; default `<method>_<leaf>`.
    lookup: (key, start) instead, on a layer that looks rows up (an embedding).
    biased: exists only where the layer has a bias.
    shared: one tensor for many targets, each of which sees the corner of it that fits: "model" for all of them, "shape"
        for those of equal (o, i), "name" for those of equal (o, i) and last name (all q_proj).
    derived: computed from the base by `Method.derive`, never written to a file.
    only: a name that `dims` gives; the leaf exists only on layers where it is not zero.
    """

    axes: str
    start: Start
    trains: bool = True
    shared: str = ""
    key: str = ""
    lookup: tuple[str, Start] | None = None
    biased: bool = False
    derived: bool = False
    only: str = ""


def sizes() -> Leaf:
    """A leaf without numbers: its shape (…, 0, o, i) tells a method the layer's sizes where no other leaf does."""
    return Leaf("none o i", zeros, trains=False, derived=True)


@dataclass(frozen=True)
class Card:
    """What documentation, command line and tests need to know beyond the fields and the leaves."""

    title: str
    paper: str = ""
    formula: str = ""
    laws: tuple[str, ...] = ()  # claims the suite verifies: rank<=<expression>, orthogonal, row_gain, identity
    aliases: tuple[str, ...] = ()


def method(name: str, **card: Any) -> Callable[[type], type]:
    """Class decorator: makes a frozen dataclass of it, collects its leaves and registers it under `name`."""

    def add(cls: type) -> type:
        cls = dataclass(frozen=True)(checked(cls, name))
        cls.name, cls.card, METHODS[name] = name, Card(**card), cls
        cls.own = {k: v for k, v in vars(cls).items() if isinstance(v, Leaf)}
        return cls

    return add


SCALINGS: dict[str, Callable[[float, int], float]] = {
    "standard": lambda alpha, r: alpha / r,  # LoRA, 2106.09685
    "rslora": lambda alpha, r: alpha / math.sqrt(r),  # rank-stabilised, 2312.03732
    "alpha": lambda alpha, r: alpha,
}


def choice(default: str, options: Iterable[str]) -> Any:
    """A field that takes one of a few words; the suite moves it to another of them, the docs list them."""
    return dataclasses.field(default=default, metadata={"choices": tuple(options)})


def checked(cls: type, name: str) -> type:
    """The class, about to become a dataclass, with every `choice` looked at before its own `__post_init__`. LorakitError with the nearest word."""
    own = getattr(cls, "__post_init__", None)

    def check(self) -> None:
        for f in dataclasses.fields(self):
            options = f.metadata.get("choices")
            if options and (value := getattr(self, f.name)) not in options:
                raise LorakitError(f"{name}: unknown {f.name} `{value}`{near(str(value), options)}")
        if own is not None:
            own(self)

    cls.__post_init__ = check
    return cls


def check_rank(name: str, r: int) -> None:
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise LorakitError(f"{name}: the rank r must be a whole number of at least 1, not {r!r}")


class Method(ABC):
    """A map from linear maps to linear maps. Classes below are abstract or final; variation is by wrapping."""

    name: ClassVar[str]
    card: ClassVar[Card]
    own: ClassVar[dict[str, Leaf]]
    adds: ClassVar[bool] = False  # act is f(x) + something, so that f may bring the bias along
    reads_base: ClassVar[bool] = False  # delta depends on W, so no part of it can be taken out of W beforehand
    replaces: ClassVar[bool] = False  # the result does not depend on the base's weight and bias at all
    follows: ClassVar[bool] = False  # a weight that is tied to the target's follows unasked
    mergeable: ClassVar[str] = "exact"  # "no": the result depends on the input, so that no one weight stands for it; "rounded": `weight_at` alone
    plain_in_files: ClassVar[bool] = False  # a saved adapter is better off as the plain LoRA that it amounts to
    last: ClassVar[bool] = False  # acts on the layer's finished output, bias included (a serial adapter)
    varies: ClassVar[Mapping[str, tuple[str, str]]] = {}  # PEFT's pattern for what may differ between targets -> (PEFT's key, our field)
    anchor: ClassVar[str] = "^"  # what makes a whole path of a key of these patterns
    peft_layers: ClassVar[tuple[str, ...]] = ("linear",)  # kinds of layers on which PEFT computes this as we do
    peft_dropout: ClassVar[str] = ""  # PEFT's key of the dropout on the input, where it has one
    asks: ClassVar[tuple[str, ...]] = ()  # what it reads of the batch beside the input: names of `lorakit.given`
    shared_seed: int | None = None  # a seed of its own for the tensors that are shared; None: the adapter's

    @abstractmethod
    def weight(self, p: Params, W: Tensor) -> Tensor:  # (o, i) -> (o, i), the definition
        ...

    def weight_at(self, p: Params, W: Tensor, site) -> Tensor:
        """W' on this target: `weight`, unless it depends on how the target's weight is kept."""
        return self.weight(p, W)

    def unrounded(self, p: Params, W: Tensor) -> Tensor:
        """What `weight_at` rounds as the target's weight is kept; W' itself where it does not."""
        return self.weight(p, W)

    def act(self, p: Params, x: Tensor, f: Map, site, drop) -> Tensor:
        """W' x. Override where there is a way that does not form W'."""
        W = self.weight(p, f.weight())
        return site.op(x, W.to(x.dtype if x.is_floating_point() else site.dtype))

    def gained(self, p: Params, x: Tensor, f: Map, site, drop, g: Tensor) -> Tensor:
        """diag(g) W' x, g (o,)."""
        y = self.act(p, x, f, site, drop)
        return site.scale(y, g.to(y.dtype), last=True)

    def update(self, p: Params, x: Tensor, f: Map, site, drop) -> Tensor:
        """(W' - W) x."""
        return self.act(p, x, f, site, drop) - f(x)

    def bias(self, p: Params, b: Tensor | None) -> Tensor | None:
        """The bias beside W'; most methods leave it alone."""
        return b

    def two(self, p: Params) -> tuple[Tensor, Tensor] | None:
        """(B, A) with W' = W + B A where the method is such a product: what every fast path and exporter needs."""
        return None

    def scaled(self, p: Params) -> tuple[Tensor, Tensor, float]:
        """(B, A, s) with W' = W + s B A, for a method that is such a product: a number that only scales stays apart."""
        return *self.two(p), 1.0

    def row_norm(self, p: Params, f: Map) -> Tensor:  # (o,): norms of the rows of W'
        two = self.two(p)
        return self.weight(p, f.weight()).norm(dim=1) if two is None else row_norm_of_sum(f.row_sq(), f.weight(), *two)

    def unfit(self, site) -> str | None:
        """Why this method means nothing on a target of this geometry; None where it fits."""
        return None

    def on(self, site) -> Method:
        """This method in the form that it takes on a target of this geometry, where it has several; the plan asks once for each target."""
        return self

    def transposed(self) -> Method:
        """The method that makes W'ᵀ of Wᵀ with the same leaves: for a head that is tied to an embedding."""
        return METHODS["transposed"](self)

    def transpose(self, p: Params) -> Params | None:
        """Leaves with which this very method makes W'ᵀ of Wᵀ, where there are such."""
        return None

    def settle(self, p: Params, W: Thunk) -> None:
        """Sets leaves that depend on where the others started (DoRA's magnitude); called once, last."""

    def derive(self, p: Params, W: Thunk) -> None:
        """Sets the derived leaves from the base; called before `settle`, and again wherever the adapter is loaded."""

    def for_files(self, p: Params) -> tuple[Method, Params]:
        """What a finished adapter is saved as: a simpler method of the same function, where training had more than use needs."""
        return self, p

    def from_file(self, shapes: dict[str, tuple[int, ...]]) -> Method:
        """This method with the fields that a file's tensor shapes (canonical layout) decide."""
        return self

    def to_peft(self) -> dict[str, Any] | None:
        """PEFT's configuration of this method, or None where PEFT has nothing like it."""
        return None

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Method | None:
        """The method a PEFT configuration describes, if it is this one."""
        return None

    def on_peft(self, site) -> bool:
        """Whether PEFT computes this as we do on a target of this very geometry; asked where `peft_layers` has its kind."""
        return True

    def layout(self, leaf: str, site) -> tuple[int, ...] | None:
        """The shape in which PEFT's files keep a leaf on this geometry, where its axes do not tell."""
        return None

    def at_peft(self, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Method:
        """This method on one target of a PEFT file, whose leaves have these shapes there."""
        return self

    @classmethod
    def joined(cls, config: dict[str, Any], methods: Mapping[str, Method]) -> dict[str, Any]:
        """PEFT's configuration of these methods of this kind by target, where it says more than that of one of them."""
        return config

    def restored(self, config: dict[str, Any], tensors: Params) -> Params:
        """A PEFT file's tensors by their keys, where the file may keep leaves in another form."""
        return tensors

    @property
    def redrawn(self) -> tuple[str, ...]:
        """Leaves that no file needs to hold: they start from a seed of their own and never change."""
        return ()

    @property
    def leaves(self) -> dict[str, Leaf]:
        return self.own

    @property
    def laws(self) -> tuple[str, ...]:
        """The card's laws that hold for these very fields."""
        return self.card.laws

    @property
    def core(self) -> Method:
        """The innermost method of a nest of wrappers."""
        return self

    def owner(self, leaf: str) -> Method:
        """The method in this nest that declares the leaf."""
        return self

    def over_core(self, wrap: Callable[[Method], Method]) -> Method:
        """This nest with `wrap` put around its core."""
        return wrap(self)

    def dims(self, o: int, i: int) -> dict[str, int]:
        ints = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type == "int"}
        return ints | {"o": o, "i": i, "none": 0}

    def shapes(self, o: int, i: int, bias: bool = False) -> dict[str, list[int]]:
        """Shape of every leaf on a layer of o outputs and i inputs, with or without a bias."""
        d = self.dims(o, i)
        here = {k: leaf for k, leaf in self.leaves.items() if (bias or not leaf.biased) and (not leaf.only or d[leaf.only])}
        return {k: [d[a] for a in leaf.axes.split()] for k, leaf in here.items()}

    def start(self, o: int, i: int, origin: Origin, gen: torch.Generator, given: Params | None = None) -> Params:
        """Every leaf at its own start, on the CPU in float32; given: those that have begun already, shared with other targets."""
        out = dict(given or {})
        for k, shape in self.shapes(o, i, origin.bias is not None).items():
            leaf = self.leaves[k]
            if k in out:
                continue
            begin = leaf.lookup[1] if origin.lookup and leaf.lookup else leaf.start
            out[k] = begin(shape, self.owner(k), origin, gen)
        return out

    def trainable(self, o: int, i: int, bias: bool = False) -> int:
        """How many numbers train on one such layer."""
        return sum(math.prod(s) for k, s in self.shapes(o, i, bias).items() if self.leaves[k].trains)

    def key(self, leaf: str, lookup: bool = False) -> str:
        """The name of a leaf in files and, up to `.weight`, on the module."""
        spec = self.leaves[leaf]
        return (spec.lookup[0] if lookup and spec.lookup else spec.key) or f"{self.core.name}_{leaf}"

    def having(self, **fields: Any) -> Method:
        """This method with fields replaced, at whatever level of nesting they are."""
        mine = {f.name for f in dataclasses.fields(self)}
        here = {k: v for k, v in fields.items() if k in mine}
        rest = {k: v for k, v in fields.items() if k not in mine}
        if rest and "inner" in mine:
            here["inner"] = self.inner.having(**rest)
        elif rest:
            name = next(iter(rest))
            raise LorakitError(f"{self.name} has no field `{name}`{near(name, mine)}")
        return dataclasses.replace(self, **here)

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"method": self.name}
        for f in dataclasses.fields(self):
            v = getattr(self, f.name)
            out[f.name] = v.to_dict() if isinstance(v, Method) else v
        return out


def method_from_dict(d: dict[str, Any]) -> Method:
    """The inverse of `Method.to_dict`."""
    d = {k: method_from_dict(v) if isinstance(v, dict) and "method" in v else v for k, v in d.items()}
    name = d.pop("method")
    if name not in METHODS:
        raise LorakitError(f"unknown method `{name}`{near(name, METHODS)}")
    known = {f.name for f in dataclasses.fields(METHODS[name])}
    for k in d:
        if k not in known:
            raise LorakitError(f"{name} has no field `{k}`{near(k, known)}")
    return METHODS[name](**d)


class Additive(Method):
    """W' = W + delta(p, W). W is a thunk: a method that never calls it never dequantises the base."""

    adds = True

    @abstractmethod
    def delta(self, p: Params, W: Thunk) -> Tensor:  # (o, i)
        ...

    def weight(self, p, W):
        return W + self.delta(p, lambda: W).to(W.dtype)

    def act(self, p, x, f, site, drop):
        return f(x) + self.update(p, x, f, site, drop)

    def update(self, p, x, f, site, drop):
        dtype, two = x.dtype if x.is_floating_point() else site.dtype, self.two(p)
        return site.op(drop(x), self.delta(p, f.weight).to(dtype)) if two is None else site.chain(x, *(F.to(dtype) for F in two), drop=drop)


class LowRank(Additive):
    """delta is a product of factors, the first (o, ·), the last (·, i); a 1-D factor is a diagonal."""

    @abstractmethod
    def factors(self, p: Params) -> tuple[Tensor, ...]: ...

    def two(self, p):
        *rest, A = self.factors(p)
        B = rest[0]
        for M in rest[1:]:
            B = B * M if M.dim() == 1 else (B[:, None] * M if B.dim() == 1 else B @ M)
        return B, A

    def delta(self, p, W):
        B, A = self.two(p)
        return B @ A

    def live(self, p: Params) -> tuple[Tensor | float, ...]:
        """The factors as the forward pass takes them: a number among them scales the thin product, so that no scaled copy of a factor is kept."""
        return self.factors(p)

    def scaled(self, p):
        B, *numbers, A = self.live(p)
        return (B, A, math.prod(numbers)) if B.dim() == 2 and not any(isinstance(n, Tensor) for n in numbers) else super().scaled(p)

    def _beside(self, p: Params, x: Tensor, f: Map, drop, g: Tensor | None = None) -> Tensor | None:
        """Base and thin product in one step; None where they are not that simple."""
        base = f.product() if type(self).update is LowRank.update else None
        two = thin(self.live(p), x, None if drop is same else drop) if base and takes(x, base[0]) else None
        return None if two is None else beside(x, *base, two, g)

    def act(self, p, x, f, site, drop):
        y = self._beside(p, x, f, drop)
        return super().act(p, x, f, site, drop) if y is None else y

    def gained(self, p, x, f, site, drop, g):
        y = self._beside(p, x, f, drop, g)
        return super().gained(p, x, f, site, drop, g) if y is None else y

    def update(self, p, x, f, site, drop):
        dtype = x.dtype if x.is_floating_point() else site.dtype
        return site.chain(x, *(F.to(dtype) if isinstance(F, Tensor) else F for F in self.live(p)), drop=drop)


class Dynamic(Method):
    """A method whose effect depends on the input (a router, a non-linearity): it adds something, and no one weight stands for it."""

    adds = True
    mergeable = "no"

    def weight(self, p, W):
        raise LorakitError(f"{self.name} depends on its input, so no one weight stands for it: it cannot be merged or exported; "
                           "mend: keep it as an adapter")

    def act(self, p, x, f, site, drop):
        return f(x) + self.update(p, x, f, site, drop)

    @abstractmethod
    def update(self, p, x, f, site, drop): ...

    @abstractmethod
    def size(self, p: Params) -> Tensor:
        """A number that is zero where the method does nothing, and else tells how much it may do."""
        ...

    def unfit(self, site):
        return f"{self.name} acts on a layer's input, and this parameter is read, not called" if site.read else None


class Serial(Dynamic):
    """An adapter behind the layer: y + after(p, y), y the layer's output with its bias."""

    last = True

    @abstractmethod
    def after(self, p: Params, y: Tensor, site, drop) -> Tensor: ...

    def update(self, p, x, f, site, drop):
        return self.after(p, f(x), site, drop)


class Part(NamedTuple):
    """An adapter of a mixed batch at one module: its name, its method and the tensors it has there."""

    name: str
    method: Method
    p: Params


# The answer to a call whose row k has parts[index[k]], -1 none: (parts, index (b,) on the CPU, inner, call, site) -> answer.
Mixed = Callable[[Sequence[Part], Tensor, Callable[[Any], Any], Any, Any], Any]


class Around(Method):
    """A method around a whole module's call: it changes what goes in or comes out, never a weight."""

    mergeable = "no"
    around_a: ClassVar[str] = "model"  # the kind of module: "model" or "attention"
    inmost: ClassVar[bool] = False  # of several, it is nearest to the module, whatever their order
    mixed: ClassVar[Mixed | None] = None  # how rows of several such methods go through one call; methods with one function mix

    def weight(self, p, W):
        raise LorakitError(f"{self.name} changes no weight: it cannot be merged or exported; mend: keep it as an adapter")

    @abstractmethod
    def around(self, p: Params, inner: Callable[[Any], Any], call: Any, site) -> Any:
        """What the module gives for this call (`lorakit.sites.Call`); inner(call) is the module's own answer."""
        ...

    def size(self, p: Params) -> Tensor:
        """A number that is zero where the method does nothing."""
        return torch.stack([t.float().norm() for t in p.values()]).norm()

    def unfit(self, site):
        return None if site.whole == self.around_a else f"{self.name} goes around a whole {self.around_a}, not on a layer; mend: leave the targets to it"


class Wrapper(Method):
    """A method around a method (`inner: Method` is its first field): it answers for the leaves of both."""

    @property
    def leaves(self):
        return self.own | self.inner.leaves

    @property
    def core(self):
        return self.inner.core

    def dims(self, o, i):
        return self.inner.dims(o, i)

    def owner(self, leaf):
        return self.inner.owner(leaf) if leaf in self.inner.leaves else self

    def key(self, leaf, lookup=False):
        return (self.own[leaf].key or f"{self.name}_{leaf}") if leaf in self.own else self.inner.key(leaf, lookup)

    @property
    def mergeable(self):
        return self.inner.mergeable

    @property
    def last(self):
        return self.inner.last

    @property
    def asks(self):
        return self.inner.asks

    @property
    def shared_seed(self):
        return self.inner.shared_seed

    @property
    def redrawn(self):
        return self.inner.redrawn

    def unfit(self, site):
        return self.inner.unfit(site)

    def on(self, site):
        return dataclasses.replace(self, inner=self.inner.on(site))

    def settle(self, p, W):
        self.inner.settle(p, W)

    def derive(self, p, W):
        self.inner.derive(p, W)

    def from_file(self, shapes):
        return dataclasses.replace(self, inner=self.inner.from_file(shapes))

    def bias(self, p, b):
        return self.inner.bias(p, b)

    def after(self, p, y, site, drop):
        return self.inner.after(p, y, site, drop)

    def size(self, p):
        return self.inner.size(p)

    def over_core(self, wrap):
        return dataclasses.replace(self, inner=self.inner.over_core(wrap))


def refuse(config: dict[str, Any], **only: Any) -> None:
    """LorakitError if a PEFT configuration has another value than these, which are all that can be carried out."""
    for k, v in only.items():
        if config.get(k, v) not in (v, None, {}, []):
            raise LorakitError(f"the adapter uses `{k}: {config[k]}`, which this version of lorakit does not carry out")


def method_from_peft(config: dict[str, Any]) -> Method:
    """The method that a PEFT configuration describes; wrappers are asked first. LorakitError if none knows it."""
    for cls in sorted(METHODS.values(), key=lambda c: not issubclass(c, Wrapper)):
        found = cls.from_peft(config)
        if found is not None:
            return found
    raise LorakitError(f"no method here reads peft_type `{config.get('peft_type')}`")
