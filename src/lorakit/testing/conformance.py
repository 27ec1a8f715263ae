"""Every method × every layer geometry × every dtype × every check; a method enters it by being registered.

A check is a function of one `Case`. Instances have every field off its default, and noise on every leaf that provably
matters, so that a field that is dropped, or an update applied twice, shows. Exceptions live in `EXCEPTIONS`, with a reason.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import pickle
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakit.methods  # noqa: F401
from lorakit import api, host
from lorakit.errors import LorakitError
from lorakit.formats import folder
from lorakit.inits import INITS
from lorakit.maps import Applied, Base, Routed
from lorakit.method import METHODS, Method, Origin, Wrapper, method_from_dict
from lorakit.quantized import pack
from lorakit.sites import Site, site_at
from lorakit.spec import Spec, attach
from lorakit.stores.scheme import scheme_of


def _conv1d_of_transformers(o: int, i: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(o, i)


def _packed(layer: nn.Module, scheme: str | dict) -> nn.Module:
    pack(layer, scheme_of(scheme))
    return layer


class Itself(nn.Module):
    """Self-attention, so that one input is enough."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 1, batch_first=True)  # an odd number of heads keeps torch off its fused path

    def forward(self, x):
        return self.attn(x, x, x)[0]


class Experts(nn.Module):
    """Matrices of three experts in one parameter; token t goes to expert t % 3."""

    def __init__(self, transposed: bool):
        super().__init__()
        self.is_transposed = transposed
        self.w = nn.Parameter(torch.randn(3, 12, 8) if transposed else torch.randn(3, 8, 12))
        self.w_bias = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):  # (b, t, 12)
        to = torch.arange(x.shape[1]) % 3
        W = self.w.mT if self.is_transposed else self.w
        return torch.einsum("bti,toi->bto", x, W[to]) + self.w_bias[to]


Build = tuple[Callable[[], nn.Module], Callable[[torch.dtype], Tensor]]
LAYERS: dict[str, Build] = {
    "linear": (lambda: nn.Linear(12, 8), lambda d: torch.randn(5, 3, 12, dtype=d)),
    "linear-square": (lambda: nn.Linear(8, 8, bias=False), lambda d: torch.randn(5, 8, dtype=d)),
    "hf-conv1d": (lambda: _conv1d_of_transformers(8, 12), lambda d: torch.randn(5, 3, 12, dtype=d)),
    "embedding": (lambda: nn.Embedding(20, 8, padding_idx=3), lambda d: torch.arange(35).view(5, 7) % 16 + 4),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3, padding=1), lambda d: torch.randn(5, 4, 9, dtype=d)),
    "conv1d-circular": (lambda: nn.Conv1d(4, 8, 3, padding=2, padding_mode="circular"), lambda d: torch.randn(5, 4, 9, dtype=d)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, 2, 1, dilation=2), lambda d: torch.randn(5, 4, 11, 11, dtype=d)),
    "conv2d-1x1": (lambda: nn.Conv2d(4, 8, 1), lambda d: torch.randn(5, 4, 6, 6, dtype=d)),
    "conv2d-wide": (lambda: nn.Conv2d(4, 8, (1, 3), padding="same", padding_mode="reflect"), lambda d: torch.randn(5, 4, 5, 7, dtype=d)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), lambda d: torch.randn(5, 4, 6, 6, dtype=d)),
    "conv2d-depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False), lambda d: torch.randn(5, 8, 6, 6, dtype=d)),
    "conv3d": (lambda: nn.Conv3d(2, 8, 2), lambda d: torch.randn(5, 2, 4, 4, 4, dtype=d)),
    "attention-in": (Itself, lambda d: torch.randn(5, 3, 8, dtype=d)),
    "attention-out": (Itself, lambda d: torch.randn(5, 3, 8, dtype=d)),
    "experts": (lambda: Experts(False), lambda d: torch.randn(5, 4, 12, dtype=d)),
    "experts-transposed": (lambda: Experts(True), lambda d: torch.randn(5, 4, 12, dtype=d)),
    "vector": (lambda: nn.LayerNorm(8), lambda d: torch.randn(5, 3, 8, dtype=d)),
    "linear-nf4": (lambda: _packed(nn.Linear(12, 8), "nf4"), lambda d: torch.randn(5, 3, 12, dtype=d)),  # its blocks straddle rows
    "hf-conv1d-int8": (lambda: _packed(_conv1d_of_transformers(8, 12), "int8"), lambda d: torch.randn(5, 3, 12, dtype=d)),
    "embedding-int4": (lambda: _packed(nn.Embedding(20, 8, padding_idx=3), {"name": "int4", "group": 8}), lambda d: torch.arange(35).view(5, 7) % 16 + 4),
    "conv2d-nf3": (lambda: _packed(nn.Conv2d(4, 8, 3, 2, 1, dilation=2), "nf3"), lambda d: torch.randn(5, 4, 11, 11, dtype=d)),
}
TARGET = {"attention-in": "layer.attn.in_proj_weight", "attention-out": "layer.attn.out_proj", "experts": "layer.w",
          "experts-transposed": "layer.w", "vector": "layer.weight"}  # parameters that are read, not called
DTYPES = {"float32": (torch.float32, 2e-5), "float64": (torch.float64, 1e-10), "bfloat16": (torch.bfloat16, 6e-2)}
_NO_SLOPE = "around LoRA's own start one factor is zero, so that the other has no gradient there; with a start that sets both, both have"
EXCEPTIONS: dict[tuple[str, str], str] = {  # (label of the method, check) -> why it cannot hold; the test runner wants it to fail
    ("l-lora(lora)", "gradients"): _NO_SLOPE, ("l-lora(lora2)", "gradients"): _NO_SLOPE,
}


def off_default(cls: type[Method], inner: Method | None = None) -> Method:
    """An instance with every field off its default."""
    values = {}
    for f in dataclasses.fields(cls):
        if f.name == "inner":
            values["inner"] = inner
        elif "choices" in f.metadata:
            values[f.name] = next(c for c in f.metadata["choices"] if c != f.default)
        elif isinstance(f.default, bool):
            values[f.name] = not f.default
        elif isinstance(f.default, int):
            values[f.name] = max(1, f.default // 2)
        elif isinstance(f.default, float):
            values[f.name] = f.default * 0.6
    return cls(**values)


def examples(cls: type[Method]) -> list[Method]:
    """Instances that together have every field off its default; a class that knows better says so in `examples()`."""
    return cls.examples() if hasattr(cls, "examples") else [off_default(cls)]


def instances(names: Iterable[str] | None = None) -> list[Method]:
    """Every registered method off its defaults, and every wrapper around each of them that it means something around."""
    classes = [METHODS[n] for n in (names or METHODS)]
    plain = [m for c in classes if not issubclass(c, Wrapper) for m in examples(c)]
    out = list(plain)
    for w in (c for c in METHODS.values() if issubclass(c, Wrapper)):
        for m in plain:
            try:
                out.append(off_default(w, m))
            except LorakitError:
                continue
    return out


def label(method: Method) -> str:
    """magnitude(lora); which of several examples of a class it is, by its number."""
    if inner := getattr(method, "inner", None):
        return f"{method.name}({label(inner)})"
    among = examples(type(method))
    return method.name if method not in among[1:] else f"{method.name}{among.index(method) + 1}"


class Holder(nn.Module):
    """A model of one layer; `layer` is its path."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def _base(layer: str, dtype: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, feed = LAYERS[layer]
    return Holder(build().to(DTYPES[dtype][0])).eval(), feed(DTYPES[dtype][0])


@cache
def _site(layer: str, dtype: str) -> Site:
    return site_at(dict(_base(layer, dtype)[0].named_modules()), TARGET.get(layer, "layer"))


@dataclass(frozen=True)
class Case:
    """One method on one kind of layer in one dtype."""

    method: Method
    layer: str
    dtype: str

    def __post_init__(self):
        object.__setattr__(self, "method", self.method.on(self.site))  # as a plan does

    @property
    def tol(self) -> float:
        return DTYPES[self.dtype][1]

    def base(self) -> tuple[nn.Module, Tensor]:
        return _base(self.layer, self.dtype)

    @property
    def path(self) -> str:
        return TARGET.get(self.layer, "layer")

    @property
    def site(self) -> Site:
        """The target's geometry, on a layer that no adapter is put on."""
        return _site(self.layer, self.dtype)

    @property
    def fits(self) -> bool:
        """Whether the method means something on this layer."""
        return self.method.unfit(self.site) is None

    @property
    def remade(self) -> float:
        """How far a start may be from the base where that is rounded anew: constants that are quantised themselves are others then."""
        return 5e-3 if self.method.mergeable == "rounded" else 0.0

    @property
    def matrix(self) -> bool:
        """Whether the adapted layer is a matrix again; else the checks that speak of one mean nothing."""
        return self.method.mergeable != "no"

    @property
    def checks(self) -> list[str]:
        return [n for n in CHECKS if self.matrix or n not in OF_A_MATRIX]

    def spec(self, **kw) -> Spec:
        at = {"targets": ("layer",)} if self.path == "layer" else {"targets": (self.path,)} if self.layer == "attention-out" else {
            "targets": (), "parameters": (self.path,)}
        return Spec(self.method, **at, **kw)

    def make(self, *names: str, noisy: bool = True, **kw) -> tuple[nn.Module, Tensor]:
        """The model with adapters of these names (the last one active), and an input."""
        model, x = self.base()
        for n, name in enumerate(names or ("a",)):
            spec = self.spec(seed=n, **kw)
            attach(model, name, spec, spec.plan(model))
            if noisy:
                noise(model, name, n + 1, 1.0 if self.method.mergeable == "rounded" else 0.2)  # what is rounded away shows nothing
        return model, x


def rel(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


@torch.no_grad()
def noise(model: nn.Module, name: str, seed: int, size: float = 0.2) -> None:
    """Moves every leaf that trains, so that no factor is at its start."""
    g = torch.Generator().manual_seed(seed)
    for slot in host.slots(model, name).values():
        for _, v in sorted(slot.params(name).items()):
            if v.requires_grad:
                v.add_(torch.randn(v.shape, generator=g).to(v) * size)


def slot_of(model: nn.Module) -> host.Slot:
    return next(iter(host.slots(model).values()))


def weight_of(model: nn.Module, c: Case) -> Tensor:
    """The target's own weight."""
    return site_at(dict(model.named_modules()), c.path).store.read()


def kept_of(model: nn.Module, c: Case) -> dict[str, Tensor]:
    """The very tensors that the target's weight is kept in."""
    store = site_at(dict(model.named_modules()), c.path).store
    return dict(store.tensors(store.take()))


def bias_of(model: nn.Module, c: Case) -> Tensor | None:
    return site_at(dict(model.named_modules()), c.path).bias


def slow(c: Case, s: host.Slot, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """The layer with another canonical weight and bias: what every fast way must equal."""
    if not s.site.read:
        return s.site.add_bias(s.site.op(x, W.to(s.site.dtype)), b)
    plain, _ = c.base()
    put = {c.path if s.raw else f"{c.path}.weight": s.site.unview(W).to(s.site.dtype)}
    if b is not None:
        put[f"{c.path.rpartition('.')[0]}.{s.site.bias_name}" if s.raw else f"{c.path}.bias"] = b.to(s.site.dtype)
    return torch.func.functional_call(plain, put, (x,))


def base_out(model: nn.Module, x: Tensor) -> Tensor:
    with api.disabled(model):
        return model(x)


def exactly(c: Case, a: Tensor, b: Tensor) -> bool:
    """The same bits; torch's attention sums in another order where nothing trains."""
    return torch.equal(a, b) or (c.layer.startswith("attention") and rel(a, b) < c.tol / 10)


# The checks


def check_identity_at_init(c: Case) -> None:
    model, x = c.make(noisy=False)
    want, _ = c.base()
    if "identity" in c.method.core.laws:
        tol = max(c.tol, 1e-6, c.remade)
        assert rel(model(x), want(x)) < tol, "an adapter at its start changes the output"
        wet, _ = c.make(noisy=False, dropout=0.5)
        assert rel(wet.train()(x), want(x)) < tol, "dropout reaches the base, or is not the same wherever an update is subtracted"
    assert exactly(c, base_out(model, x), want(x)), "a disabled adapter changes the output"


def check_two_views_agree(c: Case) -> None:
    model, x = c.make()
    s = slot_of(model)
    W = s.map({"a": 1.0}).weight()
    assert rel(model(x), slow(c, s, x, W, s.bias({"a": 1.0}))) < c.tol, "act and weight disagree"
    assert rel(model(x), base_out(model, x)) > 1e-3, "the noise must matter, or this check is empty"


def check_update_is_the_difference(c: Case) -> None:
    model, x = c.make()
    s = slot_of(model)
    if s.site.read:
        return
    one = s.applied("a", Base(s.site))
    assert rel(one.update(x) + Base(s.site)(x), one(x)) < c.tol
    half = s.applied("a", Base(s.site), 0.5)
    assert rel(half(x), (one(x) + Base(s.site)(x)) / 2) < c.tol, "a weight of 0.5 is not halfway"
    assert rel(s.site.op(x, half.weight().to(s.site.dtype)), half(x)) < c.tol


def check_merge(c: Case) -> None:
    model, x = c.make()
    y, W, kept, b = model(x), weight_of(model, c), kept_of(model, c), bias_of(model, c)
    was = {k: t.detach().clone() for k, t in kept.items()}
    api.merge(model)
    assert rel(model(x), y) < c.tol, "merged differs from live"
    now, there = weight_of(model, c), kept_of(model, c)
    assert all(t is not there.get(k) and torch.equal(t, was[k]) for k, t in kept.items()), "merging must not write in place: the weight may be tied"
    assert now.dtype == W.dtype and now.shape == W.shape
    api.unmerge(model)
    again = kept_of(model, c)
    assert all(again[k] is t and torch.equal(t, was[k]) for k, t in kept.items()) and bias_of(model, c) is b, "unmerge must be exact"
    assert torch.equal(model(x), y)
    plain, raw = api.merged(model), c.base()[0].layer
    assert type(plain.layer) is (c.site.store.plain or type(raw)) and rel(plain(x), y) < c.tol
    assert torch.equal(model(x), y), "merging a copy must leave the model alone"


def check_two_adapters(c: Case) -> None:
    model, x = c.make("a", "b")
    base, out = base_out(model, x), {}
    for n in "ab":
        api.activate(model, n)
        out[n] = model(x)
    assert rel(out["a"], out["b"]) > 1e-3
    api.activate(model, "a", "b")
    s = slot_of(model)
    b, e, d = (s.bias(a) for a in ({}, {"a": 1.0}, {"b": 1.0}))
    W, V, U = (s.map(a).weight() for a in ({}, {"a": 1.0}, {"b": 1.0})) if c.matrix else (None, None, None)

    def mix(g: float, h: float) -> Tensor:
        if not c.matrix:  # every one only adds to the base's output
            return base + g * (out["a"] - base) + h * (out["b"] - base)
        bias = None if e is None else g * e + h * d + (0 if b is None else (1 - g - h) * b)
        return slow(c, s, x, W + g * (V - W) + h * (U - W), bias)

    adds = c.matrix or c.method is c.method.core  # a serial adapter behind another's bias sees that bias, too
    assert not adds or rel(model(x), mix(1, 1)) < 2 * c.tol, "two adapters are not their sum"
    api.activate(model, "a", "b", weights=[0.5, -0.25])
    assert not adds or rel(model(x), mix(0.5, -0.25)) < 2 * c.tol, "weights are not honoured"
    if not s.site.read:
        once, other = s.affine({"a": 1.0, "b": 1.0}), x.flip(0)
        once(x)
        assert torch.equal(once(other), s.affine({"a": 1.0, "b": 1.0})(other)), "a map gives what it gave another input"
    if c.matrix:
        y = model(x)
        api.merge(model)
        assert rel(model(x), y) < 2 * c.tol
        api.unmerge(model)
    api.activate(model, "b")
    api.delete(model, "a")
    assert torch.equal(model(x), out["b"]), "deleting one adapter changes another"
    api.delete(model, "b")
    assert type(model.layer) is type(c.base()[0].layer) and exactly(c, model(x), base), "the base does not come back"


def check_chain_of_two(c: Case) -> None:
    model, x = c.make("a", "b")
    api.activate(model, "a", "b", chain=True)
    s = slot_of(model)
    nest = Applied(c.method, s.params("b"), Applied(c.method, s.params("a"), Base(s.site), s.site), s.site)
    assert rel(model(x), slow(c, s, x, nest.weight(), s.bias({"a": 1.0, "b": 1.0}))) < 2 * c.tol


def check_rows_of_a_mixed_batch(c: Case) -> None:
    model, x = c.make("a", "b")
    out = {None: base_out(model, x)}
    for n in "ab":
        api.activate(model, n)
        out[n] = model(x)
    names = ["b", "a", None, "b", "a"]
    with api.rows(model, names):
        y = model(x)
    for k, n in enumerate(names):
        assert rel(y[k], out[n][k]) < c.tol, f"row {k} is not adapter {n}"


def check_routed_one_hot(c: Case) -> None:
    model, x = c.make("a", "b")
    s = slot_of(model)
    if s.site.read:
        return
    maps = [s.applied(n, Base(s.site)) for n in "ab"]
    hot = Routed(Base(s.site), maps, lambda x: torch.tensor([0.0, 1.0], dtype=s.site.dtype))
    assert rel(hot(x), maps[1](x)) < c.tol


def check_starts_keep_the_function(c: Case) -> None:
    want, x = c.base()
    for name, init in INITS.items():
        if init.joint or init.mends or init.collect or init.unfit(c.method) or "0" in "".join(c.method.leaves):
            continue
        rounds = c.site.store.packs  # what is taken out of it would be rounded
        for storage in ("offset", "base") if init.nonzero and not rounds else ("offset",):
            spec = c.spec(init=name, storage=storage, dropout=0.5)
            model, _ = c.base()
            try:
                attach(model, "a", spec, spec.plan(model))
            except LorakitError as e:
                assert any(t in str(e) for t in ("do not fit", "means nothing", "must be even", "must be at most")), e  # says why it cannot
                continue
            W0, W = weight_of(want, c), weight_of(model, c)  # a base that gave up a start was rounded once, at its new size
            tol = max(c.tol, 1e-5, c.remade) + 4 * torch.finfo(W.dtype).eps * float((W - W0).detach().norm() / W0.detach().norm())
            assert rel(model(x), want(x)) < tol, f"init {name} ({storage}) changes the function"
            assert rel(base_out(model, x), want(x)) < tol, f"init {name} ({storage}) changes the base"
            if storage == "offset":
                assert rel(model.train()(x), want(x)) < tol, f"init {name}: the start and its copy see different dropout masks"
                model.eval()
            noise(model, "a", 1)
            with tempfile.TemporaryDirectory() as tmp:
                folder.save(model, tmp, "a")
                again, _ = c.base()
                folder.load(again, tmp, "a")
                assert rel(again(x), model(x)) < tol, f"init {name} ({storage}): the file is wrong on an untouched base"
            api.detach(model)
            assert torch.equal(weight_of(model, c), W0), "the base must come back to the bit"


def check_no_matrix_says_so(c: Case) -> None:
    """What depends on its input refuses everything that would need one weight for it, and leaves the model as it was."""
    if c.matrix:
        return
    model, x = c.make()
    y = model(x)
    for refused in (api.merge, api.merged, lambda m: folder.save(m, "/nowhere/at/all", "a", form="lora")):
        try:
            refused(model)
        except LorakitError as e:
            assert c.method.core.name in str(e), "an error must name the method"
        else:
            raise AssertionError("merged or exported, which it cannot be")
    assert torch.equal(model(x), y) and rel(y, base_out(model, x)) > 1e-3


def check_save_and_load(c: Case) -> None:
    model, x = c.make(dropout=0.25)
    y = model(x)
    assert method_from_dict(json.loads(json.dumps(c.method.to_dict()))) == c.method, "a field is lost on the way through JSON"
    with tempfile.TemporaryDirectory() as tmp:
        for form in ("native", "auto"):
            folder.save(model, tmp, "a", form=form)
            again, _ = c.base()
            read = folder.load(again, tmp, "b")
            exact = form == "native" or not read.receipt["converted_to_lora"]
            assert torch.equal(again(x), y) if exact else rel(again(x), y) < max(c.tol, 1e-5), f"loaded ({form}) differs from saved"
            assert read.spec.dropout == 0.25 or read.config["peft_type"] == "LORAKIT"


def check_gradients(c: Case) -> None:
    model, x = c.make()
    model(x).double().square().sum().backward()
    s = slot_of(model)
    for k, v in s.params("a").items():
        leaf = c.method.leaves[k]
        holder = s.module._modules[s.attr("a", k)]._parameters["a"]
        got = holder.grad is not None and float(holder.grad.abs().sum()) > 0
        assert got == leaf.trains, f"leaf {k}: trains={leaf.trains}, gradient={'yes' if got else 'no'}"
        assert v.dtype == torch.promote_types(s.site.dtype, torch.float32), f"leaf {k} lives below float32"
    assert all(t.grad is None and not t.requires_grad for t in kept_of(model, c).values()), "the base trains"


def check_gradients_are_the_slow_views(c: Case) -> None:
    if c.dtype == "bfloat16":
        return
    model, x = c.make()
    s = slot_of(model)
    p = {k: v for k, v in model.named_parameters() if v.requires_grad}
    probe = torch.randn_like(model(x))
    fast = torch.autograd.grad((model(x) * probe).sum(), list(p.values()))
    slow_out = slow(c, s, x, s.map({"a": 1.0}).weight(), s.bias({"a": 1.0}))
    told = torch.autograd.grad((slow_out * probe).sum(), list(p.values()))
    for k, a, b in zip(p, fast, told, strict=True):
        assert rel(a, b) < 20 * c.tol, f"the gradient of {k} is not that of the definition"


def check_frozen_leaves(c: Case) -> None:
    trains = [k for k, leaf in c.method.leaves.items() if leaf.trains]
    if len(trains) < 2:
        return
    model, _ = c.make(noisy=False, freeze=(trains[0],))
    s = slot_of(model)
    assert [k for k, v in s.params("a").items() if v.requires_grad] == [k for k in s.shapes("a") if k in trains[1:]]


def check_count_and_laws(c: Case) -> None:
    model, _ = c.make()
    s = slot_of(model)
    bias = s.site.bias is not None
    shared = {k: p for k, p in _shared(s, c).items() if p.requires_grad}
    own = api.trainable(model)[0] - sum(p.numel() for p in shared.values())
    corners = sum(math.prod(s.shapes("a")[k]) for k in shared)
    assert own + corners * math.prod(s.site.stack) == c.method.trainable(s.site.out, s.site.in_, bias) * math.prod(s.site.stack)
    W = s.map({}).weight().double()
    V = s.map({"a": 1.0}).weight().double() if c.matrix else None
    for law in c.method.laws:
        LAWS[law.partition("<=")[0].partition("=")[0]](c, s, W, V, law)


def _shared(s: host.Slot, c: Case) -> dict[str, Tensor]:
    return {k: s.module._modules[s.attr("a", k)]._parameters["a"] for k, leaf in c.method.leaves.items() if leaf.shared}


def _law_rank(c, s, W, V, law):
    if c.dtype == "bfloat16":
        return
    sv = torch.linalg.svdvals(V - W).flatten(0, -2) if s.site.stack else torch.linalg.svdvals(V - W)[None]
    bound = eval(law.partition("<=")[2], {"min": min, "max": max}, c.method.dims(s.site.out, s.site.in_))
    floor = 1e-5 * sv.max() + 4 * torch.finfo(s.site.dtype).eps * W.norm()  # what subtracting W leaves of rounding
    assert int((sv > floor).sum(-1).max()) <= bound, f"rank above {bound}"


def _law_orthogonal(c, s, W, V, law):
    assert rel(torch.linalg.svdvals(V), torch.linalg.svdvals(W)) < max(c.tol, 1e-4)


def _law_row_gain(c, s, W, V, law):
    cos = torch.cosine_similarity(V, W, dim=-1).abs()
    assert rel(cos, torch.ones_like(cos)) < max(c.tol, 1e-6)


def _law_row_norm(c, s, W, V, law):
    assert rel(V.norm(dim=-1), s.params("a")[law.partition("=")[2]].abs()) < max(c.tol, 1e-6)


def _law_row_angles(c, s, W, V, law):
    a, b = (F / F.norm(dim=-1, keepdim=True).clamp_min(1e-12) for F in (W, V))
    assert rel((b @ b.mT).abs(), (a @ a.mT).abs()) < max(c.tol, 1e-5), "angles between rows change"


LAWS = {"rank": _law_rank, "row_angles": _law_row_angles, "orthogonal": _law_orthogonal, "row_gain": _law_row_gain, "row_norm": _law_row_norm,
        "identity": lambda *a: None}  # identity has a check of its own


def check_dropout(c: Case) -> None:
    model, x = c.make(dropout=0.5)
    y = model(x)
    assert torch.equal(model(x), y), "dropout is active in eval"
    model.train()
    torch.manual_seed(1)
    a, b = model(x), model(x)
    if slot_of(model).site.drops and c.method.core.adds:
        assert not torch.equal(a, b), "no dropout in train"
    torch.manual_seed(1)
    assert torch.equal(model(x), a), "dropout does not follow the global seed"
    assert exactly(c, base_out(model, x), base_out(model.eval(), x)), "dropout reaches the base"


def check_copies(c: Case) -> None:
    model, x = c.make()
    y = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), y) and slot_of(other).site.module in list(other.modules())
        noise(other, "a", 9)
        assert torch.equal(model(x), y), "a copy shares tensors with the original"


def check_keys_and_class(c: Case) -> None:
    raw, _ = c.base()
    keys = set(raw.state_dict())
    model, _ = c.make()
    assert keys <= set(model.state_dict()), "a base key changed its name"
    kept, mine = kept_of(model, c), slot_of(model)
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert isinstance(model.layer, type(raw.layer)) and all(id(t) in own for t in kept.values())
    assert all(n.startswith(mine.path.rpartition(".")[0]) for n, p in model.named_parameters() if p.requires_grad)
    layer = model.layer
    api.detach(model)
    assert model.layer is layer and all(kept_of(model, c)[k] is t for k, t in kept.items()) and type(layer) is type(raw.layer)
    assert set(model.state_dict()) == keys and not {"slot", "slots"} & set(vars(layer)) and all(p.requires_grad for p in model.parameters())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in raw.named_modules()]


def check_checkpointing(c: Case) -> None:
    model, x = c.make(dropout=0.3)
    model.train()
    grads = []
    for recompute in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.double().square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert grads[0] and all(torch.equal(a, b) for a, b in zip(*grads, strict=True)), "checkpointing changes gradients"


def check_autocast(c: Case) -> None:
    if c.dtype != "float32":
        return
    model, x = c.make()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert rel(y, model(x)) < 6e-2


def check_compile(c: Case) -> None:
    if c.dtype != "float32":
        return
    model, x = c.make()
    torch._dynamo.reset()
    assert rel(torch.compile(model, backend="eager", fullgraph=True)(x), model(x)) < c.tol


def check_resume(c: Case) -> None:
    """Four steps, and two steps, a save, a fresh process's worth of nothing, a load, two steps: the same bits."""
    if c.dtype == "bfloat16":
        return

    def steps(model, opt, n, x):
        for _ in range(n):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()

    def adam(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)

    straight, x = c.make(dropout=0.3)
    straight.train()
    torch.manual_seed(5)
    opt = adam(straight)
    steps(straight, opt, 2, x)
    with tempfile.TemporaryDirectory() as tmp:
        folder.save(straight, tmp, "a", form="native")
        kept, rng = copy.deepcopy(opt.state_dict()), torch.get_rng_state()
        steps(straight, opt, 2, x)
        again, _ = c.make(dropout=0.3, noisy=False)
        folder.fill(again, "a", folder.Folder(tmp))
    opt = adam(again.train())
    opt.load_state_dict(kept)
    torch.set_rng_state(rng)
    steps(again, opt, 2, x)
    for k, v in slot_of(straight).params("a").items():
        assert torch.equal(v, slot_of(again).params("a")[k]), f"leaf {k} differs after resuming"


def check_start_is_declared(c: Case) -> None:
    """The table of leaves is the truth: shapes, and one generator that does not touch the global one."""
    model, _ = c.make(noisy=False)
    s = slot_of(model)
    before = torch.get_rng_state()
    W, b, many = s.map({}).weight().float(), s.site.bias, bool(s.site.stack)
    p = c.method.start(s.site.out, s.site.in_, Origin(lambda: W[0] if many else W, b[0] if many and b is not None else b, s.site.lookup), torch.Generator())
    assert torch.equal(before, torch.get_rng_state()), "a start draws from the global generator"
    assert {k: [*(s.site.stack if not c.method.leaves[k].shared else ()), *v.shape] for k, v in p.items()} == s.shapes("a")


OF_A_MATRIX = {"two_views_agree", "update_is_the_difference", "merge", "chain_of_two", "routed_one_hot", "gradients_are_the_slow_views"}
CHECKS: dict[str, Callable[[Case], None]] = {k.removeprefix("check_"): v for k, v in list(globals().items()) if k.startswith("check_")}


def check_method(method: type[Method] | Method, layers: Iterable[str] = LAYERS, dtypes: Iterable[str] = DTYPES,
                 checks: Iterable[str] | None = None) -> int:
    """Runs the whole suite on a method, plain and under every wrapper that fits; returns how many checks passed.

    Raises AssertionError whose first line names method, layer, dtype and check.
    """
    plain = examples(method) if isinstance(method, type) else [method]
    every = list(plain)
    for w in (c for c in METHODS.values() if issubclass(c, Wrapper)):
        for m in plain:
            try:
                every += [] if isinstance(m, Wrapper) else [off_default(w, m)]
            except LorakitError:
                continue
    passed = 0
    for m in every:
        for layer in layers:
            for dtype in dtypes:
                c = Case(m, layer, dtype)
                for name in (checks or CHECKS) if c.fits else ():
                    if (label(m), name) in EXCEPTIONS or name not in c.checks:
                        continue
                    try:
                        CHECKS[name](Case(m, layer, dtype))
                    except Exception as e:
                        raise AssertionError(f"{label(m)} on {layer} in {dtype}: {name}: {e}") from e
                    passed += 1
    return passed
