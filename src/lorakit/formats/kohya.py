"""kohya / A1111: one safetensors file with flat names, as sd-scripts and LyCORIS write it.

    <prefix>_<path, its dots as underscores>.lora_down.weight (r, i), .lora_up.weight (o, r), .alpha ()      W + (alpha/r) up down
    .hada_w1_a … .hada_t2 (LoHa), .lokr_w1 … .lokr_t2 (LoKr), .dora_scale (o, 1)                               and a magnitude around any

No alpha, or alpha 0, means scale 1. `lora_mid.weight` (r, r, k, k) stands between the factors of a convolution; it is multiplied into
the first one. A path cannot be told from its name, so the base's own modules say it. A LoKr of two full factors has scale 1 there. A core's shape ends
in the kernel's own sizes, where PEFT's has two dimensions at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.errors import LorakitError, near
from lorakit.formats.base import Format, lora_of, lora_part, names_of, not_lora, rank_stabilised, tensors_of, times
from lorakit.formats.folder import Folder, Part
from lorakit.method import Method
from lorakit.methods.loha import LoHa
from lorakit.methods.lokr import LoKr
from lorakit.methods.magnitude import Magnitude
from lorakit.sites import adaptable, site_for

PREFIXES = ("lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lora_transformer", "lycoris")
TEXT = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS")
CUT = "this LoKr cuts {}, where kohya's files have W1 ⊗ W2 over the channels"
CORES = ("t1", "t2")
Leaves = dict[str, Tensor]


def _lora(where: str, t: Leaves, alpha: float | None, pixels: int) -> Part:
    A, B = t.pop("lora_down.weight"), t.pop("lora_up.weight")
    if (mid := t.pop("lora_mid.weight", None)) is not None:
        A = torch.einsum("ij...,jc->ic...", mid, A.flatten(1))
    return lora_part(where, A, B, alpha or A.shape[0])


def _loha(where: str, t: Leaves, alpha: float | None, pixels: int) -> Part:
    tucker = "hada_t1" in t
    leaves = {k: t.pop(f"hada_{k}") for k in ("w1_a", "w1_b", "w2_a", "w2_b", *(("t1", "t2") if tucker else ()))}
    r = leaves["w1_b"].shape[0]
    method = LoHa(r, float(alpha or r), tucker=tucker, kernel=pixels)
    out, width = leaves["w1_a"].shape[int(tucker)], leaves["w1_b"].shape[1]
    if not _fits(method, out, width * pixels if tucker else width, leaves):
        raise LorakitError(f"{where}: the factors of this LoHa do not fit each other: {', '.join(f'{k} {list(v.shape)}' for k, v in leaves.items())}")
    return Part(method, _pefts(leaves))


def _lokr(where: str, t: Leaves, alpha: float | None, pixels: int) -> Part:
    leaves = {k.removeprefix("lokr_"): t.pop(k) for k in list(t) if k.startswith(("lokr_w", "lokr_t2"))}
    tucker = "t2" in leaves
    l, m = leaves["w1"].shape if "w1" in leaves else (leaves["w1_a"].shape[0], leaves["w1_b"].shape[1])
    k, n = leaves["w2"].shape[:2] if "w2" in leaves else (leaves["w2_a"].shape[int(tucker)], leaves["w2_b"].shape[1])
    n = n if "w2" in leaves or tucker else n // max(pixels, 1)
    ranks = [leaves[f].shape[0] for f in ("w1_b", "w2_b") if f in leaves]
    r = ranks[0] if ranks else max(k, n)
    alpha = float(alpha or r) if ranks else float(r)
    for factor in (-1, l, m):
        method = LoKr(r, alpha, factor, "w1_a" in leaves, tucker=tucker, kernel=pixels)
        if _fits(method, l * k, m * n * max(pixels, 1), leaves):
            return Part(method, _pefts(leaves))
    raise LorakitError(f"{where}: its Kronecker factors ({l}, {m}) and ({k}, {n}) of rank {r} are cut in a way that the house has not "
                       "(unbalanced_factorization, or one rank beyond its factor)")


def _fits(method: Method, o: int, i: int, leaves: Leaves) -> bool:
    """Whether these are the method's leaves on a layer of o outputs and i inputs, up to the dimensions of a kernel."""
    return {f: tuple(s) for f, s in method.shapes(o, i).items()} == {f: tuple(x.flatten(1).shape) for f, x in leaves.items()}


def _pefts(leaves: Leaves) -> Leaves:
    """The leaves with cores of two dimensions of pixels at least."""
    return {k: t[..., None] if k in CORES and t.dim() == 3 else t for k, t in leaves.items()}


KINDS: dict[str, Callable[[str, Leaves, float | None, int], Part]] = {
    "lora_down.weight": _lora, "hada_w1_a": _loha, "lokr_w1": _lokr, "lokr_w1_a": _lokr}


def flat(prefix: str, path: str) -> str:
    return f"{prefix}_{path.replace('.', '_')}"


class Kohya(Format):
    name = "kohya"
    looks_for = "a .safetensors file with keys like lora_unet_….lora_down.weight, .hada_w1_a or .lokr_w1"
    suffix = ".safetensors"
    reads_with_base = True
    options = ("prefix",)

    def found(self, path):
        return path.is_file() and path.suffix == self.suffix and any(k.partition(".")[2] in KINDS for k in tensors_of(path, keys=True))

    def read(self, path, model):
        tensors = tensors_of(path)
        if model is None:
            raise LorakitError(f"{path}: kohya's flat names can be read only beside the base whose modules they mean; mend: give base")
        modules = {n: m for n, m in names_of(model).items() if adaptable(m)}
        named: dict[str, dict[str, Tensor]] = {}
        for k, t in tensors.items():
            named.setdefault(k.partition(".")[0], {})[k.partition(".")[2]] = t
        prefix, left = _prefix(path, list(named), modules)
        paths = _paths(prefix, modules)
        parts, bare = {}, []
        for name, t in named.items():
            if name not in paths:
                continue
            parts[paths[name]] = _part(f"{path}: {name}", t, modules[paths[name]])
            bare += [] if "alpha" in t else [name]
        notes = [f"{len(bare)} of {len(parts)} targets have no alpha: scale 1"] if bare else []
        notes += [f"left out: {n} targets under {p}_, which are another model's" for p, n in left.items()]
        return Folder.held(path, parts, notes)

    def unfit(self, part):
        core = part.method.inner if isinstance(part.method, Magnitude) else part.method
        if type(core) in (LoHa, LoKr):
            return CUT.format("in the other order") if type(core) is LoKr and core.swapped else None
        return not_lora(part, magnitude=True, lookup=False, slides=True)

    def write(self, source, out, model, prefix=None, **options: Any):
        parts = source.parts()
        prefix = prefix or ("lora_te" if source.config.get("task_type") in TEXT or _reads_tokens(model) else "lora_unet")
        if prefix not in PREFIXES:
            raise LorakitError(f"prefix: unknown `{prefix}`{near(prefix, PREFIXES)}")
        tensors, folded = {}, 0
        for path, part in parts.items():
            module = names_of(model).get(path) if model is not None else None
            part, turned = _full_kronecker(_on(path, part, module))
            folded += turned
            tensors |= {f"{flat(prefix, path)}.{k}": t.contiguous() for k, t in _tensors(part).items()}
        save_file(tensors, str(out), metadata={"format": "pt", "ss_network_module": _module(parts), "ss_base_model_name": str(source.base or "")})
        stabilised = rank_stabilised({p: part for p, part in parts.items() if lora_of(part.method)})
        return [f"names begin with {prefix}_", *stabilised, *([f"{folded} LoKr targets of two full factors: alpha/r folded into the second"] if folded else [])]


def _reads_tokens(model: nn.Module | None) -> bool:
    return getattr(model, "get_input_embeddings", None) is not None


def _module(parts: dict[str, Part]) -> str:
    return "networks.lora" if all(lora_of(p.method) and not isinstance(p.method, Magnitude) for p in parts.values()) else "lycoris.kohya"


def _paths(prefix: str, paths: Any) -> dict[str, str]:
    """Flat name -> path. LorakitError where two paths have one name."""
    out: dict[str, str] = {}
    for p in paths:
        if (other := out.setdefault(flat(prefix, p), p)) != p:
            raise LorakitError(f"`{other}` and `{p}` have one flat name, {flat(prefix, p)}, so kohya's format cannot tell them apart")
    return out


def _prefix(path: Path, names: list[str], modules: dict[str, nn.Module]) -> tuple[str, dict[str, int]]:
    """The prefix under which the file's names are this model's, and how many names stand under others."""
    groups: dict[str, list[str]] = {}
    for n in names:
        p = max((p for p in PREFIXES if n.startswith(f"{p}_")), key=len, default=None)
        if p is None:
            raise LorakitError(f"{path}: `{n}` begins with no prefix of kohya's{near(n, PREFIXES)} (known are {', '.join(PREFIXES)})")
        groups.setdefault(p, []).append(n)
    hits = {p: sum(n in known for n in ns) for p, ns in groups.items() for known in [_paths(p, modules)]}
    full = [p for p, ns in groups.items() if hits[p] == len(ns)]
    if len(full) == 1:
        return full[0], {p: len(ns) for p, ns in groups.items() if p != full[0]}
    if len(full) > 1:
        raise LorakitError(f"{path} holds adapters of several models ({', '.join(full)}), and each fits this one; mend: keep those of one in the file")
    best = max(groups, key=lambda p: hits[p])
    lost = next(n for n in groups[best] if n not in _paths(best, modules))
    raise LorakitError(f"{path}: `{lost}` is no module of this base{near(lost, _paths(best, modules), 1)}; {hits[best]} of {len(groups[best])} names are")


def _part(where: str, tensors: Leaves, module: nn.Module) -> Part:
    t = dict(tensors)
    kind = next((k for k in KINDS if k in t), None)
    if kind is None:
        raise LorakitError(f"{where}: holds {', '.join(t)}, which is no LoRA, LoHa or LoKr")
    alpha, scale = t.pop("alpha", None), t.pop("dora_scale", None)
    try:
        site = site_for(module)
        part = KINDS[kind](where, t, None if alpha is None else float(alpha), math.prod(site.raw[1:]) if site.slides else 0)
    except KeyError as e:
        raise LorakitError(f"{where}: the tensor {e} is missing; it holds {', '.join(tensors)}") from None
    if t:
        raise LorakitError(f"{where}: holds `{next(iter(t))}`, which this reader does not know")
    return part if scale is None else _with_magnitude(where, part, scale, module)


def _with_magnitude(where: str, part: Part, scale: Tensor, module: nn.Module) -> Part:
    o = site_for(module).out
    if scale.shape[0] != o or scale.numel() != o:
        raise LorakitError(f"{where}: dora_scale {list(scale.shape)} is a magnitude for each input, of an older LyCORIS; DoRA has one for each of the {o} "
                           "outputs; mend: merge it with LyCORIS, or train it with wd_on_out")
    m = scale.reshape(1, -1, *[1] * (scale.dim() - 2)) if scale.dim() > 2 else scale.reshape(-1)
    return Part(Magnitude(part.method), {**part.leaves, "m": m})


def _full_kronecker(part: Part) -> tuple[Part, bool]:
    core = part.method.core
    if not isinstance(core, LoKr) or not {"w1", "w2"} <= part.leaves.keys() or core.alpha == core.r:
        return part, False
    return times(replace(part, method=part.method.having(alpha=float(core.r))), "w2", core.alpha / core.r), True


def _on(path: str, part: Part, module: nn.Module | None) -> Part:
    """The adapter with its cores as this layer's kernel has them. LorakitError where a kernel makes a difference and the layer is not known."""
    core, cores = part.method.core, [k for k in CORES if k in part.leaves]
    if not isinstance(core, LoKr) and not cores:
        return part
    if module is None:
        if core.kernel > 1 or any(t.dim() > 2 for t in part.leaves.values()):
            raise LorakitError(f"{path}: its convolution's kernel cannot be told without the base; mend: give base")
        return part
    site = site_for(module)
    if bool(core.kernel) != site.slides:
        raise LorakitError(f"{path}: {CUT.format('the whole kernel')}; mend: rank=R, for a plain LoRA")
    return replace(part, leaves=dict(part.leaves) | {k: part.leaves[k].flatten(2).unflatten(2, site.raw[1:]) for k in cores})


def _tensors(part: Part) -> Leaves:
    method: Method = part.method
    own = dict(part.leaves)
    m = own.pop("m", None)
    core = lora_of(method)
    if core is not None:
        out = {"lora_down.weight": own["A"], "lora_up.weight": own["B"], "alpha": torch.tensor(core.s * core.r)}
    else:
        out = {method.core.key(k): t for k, t in own.items()} | {"alpha": torch.tensor(method.core.alpha)}
    return out if m is None else out | {"dora_scale": m.reshape(-1, *[1] * (max(m.dim(), 2) - 1))}
