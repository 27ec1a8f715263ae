"""The name people know -> a composition, one row each. `compose` turns a name and ecosystem options into a Spec."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit import methods  # noqa: F401
from lorakit.errors import LorakitError, near
from lorakit.inits import INITS
from lorakit.method import Method
from lorakit.methods.bitfit import BitFit
from lorakit.methods.bottleneck import Bottleneck
from lorakit.methods.full import Full
from lorakit.methods.hydralora import HydraLoRA
from lorakit.methods.lora import LoRA
from lorakit.methods.lotr import LoTR
from lorakit.methods.magnitude import Magnitude
from lorakit.methods.poly import Poly
from lorakit.methods.tied_lora import TiedLoRA
from lorakit.methods.vblora import VBLoRA
from lorakit.methods.vera import VeRA
from lorakit.spec import Spec


@dataclass(frozen=True)
class Recipe:
    method: Method
    title: str
    paper: str
    formula: str
    init: str | None = None
    freeze: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)  # other fields of the Spec, where the recipe has a say


RECIPES: dict[str, Recipe] = {
    "lora": Recipe(LoRA(), "LoRA", "2106.09685", "W + (alpha/r) B A"),
    "rslora": Recipe(LoRA(scaling="rslora"), "rank-stabilised LoRA", "2312.03732", "W + (alpha/sqrt(r)) B A", aliases=("rank-stabilized-lora",)),
    "dora": Recipe(Magnitude(LoRA()), "DoRA", "2402.09353", "diag(m / |W + s B A|) (W + s B A)", aliases=("weight-decomposed-lora",)),
    "lora-fa": Recipe(LoRA(), "LoRA-FA", "2308.03303", "W + s B A, A frozen", freeze=("A",), aliases=("lorafa",)),
    "asymmetric-lora": Recipe(LoRA(), "Asymmetric LoRA", "2402.16842", "W + s B A, A frozen with A Aᵀ = I", "orthogonal", ("A",), ("lorasym",)),
    "lora-nonzero": Recipe(LoRA(), "LoRA from a non-zero start", "2505.23194", "W - s B0 A0 + s B A", "nonzero", aliases=("nzlora",)),
    "vera": Recipe(VeRA(), "VeRA", "2310.11454", "W + diag(b) B diag(d) A, A and B frozen and shared"),
    "dvora": Recipe(Magnitude(VeRA()), "DVoRA", "2402.09353", "diag(m / |V|) V, V = W + diag(b) B diag(d) A"),
    "lotr": Recipe(LoTR(), "LoTR", "2402.01376", "W + (scale/r) B G A, A and B shared"),
    "tied-lora": Recipe(TiedLoRA(), "Tied-LoRA", "2311.09578", "W + s diag(v) B diag(u) A, A and B shared", aliases=("tiedlora",)),
    "vb-lora": Recipe(VBLoRA(), "VB-LoRA", "2405.15179", "W + B A, pieces of A and B mixed from one bank", aliases=("vblora",)),
    "hydralora": Recipe(HydraLoRA(), "HydraLoRA", "2404.19245", "W x + s sum_k softmax(G x)_k B_k A x", aliases=("hydra-lora",)),
    "poly": Recipe(Poly(), "Poly", "2202.13914", "W + (A_t B_t)ᵀ / r, mixtures of skills for task t", aliases=("polytropon",)),
    "mhr": Recipe(Poly(n_splits=4), "Poly with multi-head routing", "2211.03831", "W + (A_t B_t)ᵀ / r, skills mixed in each split"),
    "houlsby": Recipe(Bottleneck(), "Houlsby adapters", "1902.00751", "y + U act(D y), behind attention and feed-forward parts",
                      options={"targets": "block-outputs"}),
    "pfeiffer": Recipe(Bottleneck(), "Pfeiffer adapters", "2005.00247", "y + U act(D y), behind feed-forward parts", options={"targets": "mlp-out"}),
    "full": Recipe(Full(), "full fine-tuning of the targets", "", "V", aliases=("full-fine-tuning",)),
    "bitfit": Recipe(BitFit(), "BitFit", "2106.10199", "W; b -> c"),
}

ALIASES = {  # how configurations in the wild spell our fields
    "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_r": "r", "lora_rank": "r", "rank": "r", "target_modules": "targets",
    "lora_target_modules": "targets", "lora_target": "targets", "exclude_modules": "exclude", "layers_to_transform": "layers",
    "init_lora_weights": "init", "target_parameters": "parameters", "trainable_token_indices": "tokens", "ensure_weight_tying": "tie",
}
_SWITCHES = ("use_dora", "use_rslora")


def find(name: str) -> str:
    """The row that a name, in any common spelling, stands for. LorakitError with the nearest one otherwise."""
    word = name.lower().replace("_", "-").replace(" ", "-")
    names = {k: k for k in RECIPES} | {a: k for k, r in RECIPES.items() for a in r.aliases}
    if word not in names:
        raise LorakitError(f"unknown method `{name}`{near(word, names)} (see: lorakit methods)")
    return names[word]


def compose(recipe: str | Spec | Method = "lora", **options: Any) -> Spec:
    """A Spec from a recipe's name and options spelled as in PEFT or as here.

    >>> compose("dora", r=4, lora_alpha=8, target_modules=["q_proj"]).method.inner.r
    4
    """
    if isinstance(recipe, Spec):
        spec = recipe
    elif isinstance(recipe, Method):
        spec = Spec(recipe)
    else:
        name = find(recipe)
        row = RECIPES[name]
        spec = Spec(row.method, init=row.init, freeze=row.freeze, recipe=name, **row.options)
    options = {ALIASES.get(k, k): v for k, v in options.items() if v is not None}
    if options.get("parameters"):
        options.setdefault("targets", ())  # what was named is what is meant
    method = spec.method
    if options.pop("use_rslora", False):
        method = method.having(scaling="rslora")
    if options.pop("use_dora", False) and not isinstance(method, Magnitude):
        method = Magnitude(method)
    mine = {f.name for f in dataclasses.fields(Spec)} - {"method", "recipe"}
    fields = {k: v for k, v in options.items() if k not in mine}
    for k in fields:
        _known(method, k, mine)
    own = {k: _plain(k, v) for k, v in options.items() if k in mine}
    return dataclasses.replace(spec, method=method.having(**_typed(fields)) if fields else method, **_init(own))


def _known(method: Method, name: str, others: set[str]) -> None:
    fields: set[str] = set()
    m: Method | None = method
    while m is not None:
        fields |= {f.name for f in dataclasses.fields(m)} - {"inner"}
        m = getattr(m, "inner", None)
    if name not in fields:
        raise LorakitError(f"{method.core.name} has no option `{name}`{near(name, [*fields, *others, *ALIASES, *_SWITCHES])}")


def _plain(name: str, value: Any) -> Any:
    if name in ("freeze", "modules_to_save", "parameters") and isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _typed(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: float(v) if k == "alpha" and isinstance(v, int) else v for k, v in fields.items()}


def _init(own: dict[str, Any]) -> dict[str, Any]:
    """`init` may be a name, true (the method's own start), or {name: …, storage: …}."""
    init = own.get("init")
    if isinstance(init, Mapping):
        for k in init:
            if k not in ("name", "storage"):
                raise LorakitError(f"init has no option `{k}`{near(k, ('name', 'storage'))}")
        own |= dict(init) | {"init": init.get("name")}
        own.pop("name", None)
    elif init is True:
        own["init"] = None
    if isinstance(own.get("init"), str):
        names = {k: k for k in INITS} | {a: k for k, i in INITS.items() for a in i.aliases}
        if own["init"] not in names:
            raise LorakitError(f"init: unknown start `{own['init']}`{near(own['init'], names)}")
        own["init"] = names[own["init"]]
    return own
