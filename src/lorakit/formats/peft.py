"""The PEFT adapter folder: `adapter_config.json` and `adapter_model.safetensors`, read and written exactly.

Keys are `base_model.model.<module path>.<leaf key>`, without the adapter's name; a convolution's factors have the layer's
kernel shape. Parameters that are read and not called have paths of PEFT's own, made of the layers it nests. What PEFT has no
configuration for is written in the same layout with `peft_type: LORAKIT` and the spec beside it, which PEFT refuses by name.
The mapping of each method's fields lives in the method's own file (`to_peft`, `from_peft`).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.host import Holder, Leaves, Slot
from lorakit.method import Around, Method, method_from_dict, method_from_peft
from lorakit.methods.bitfit import BitFit
from lorakit.methods.full import Full
from lorakit.methods.tokens import Tokens
from lorakit.sites import adaptable, named_as, place, plain, reads, site_at
from lorakit.spec import Spec, matched

FORMAT = 1
CONFIG, TENSORS, RECEIPT = "adapter_config.json", "adapter_model.safetensors", "receipt.json"
PREFIX = "base_model.model."
OWN = "LORAKIT"
NEST = ".base_layer"  # how PEFT's paths show that it wrapped a module more than once
TWICE = (".modules_to_save.", ".original_module.")  # with bias="all" PEFT writes the biases of a module it saves whole once more
ONLY_IN_TRAINING = ("rank_dropout", "module_dropout", "boft_dropout")
COPIES = "ln_tuning_layers"  # in PEFT's paths, what stands in for a whole module
TOKENS_KEY = ".token_adapter.trainable_tokens_delta"


def expected(slots: Mapping[str, Slot], name: str, files: Mapping[str, str]) -> dict[str, tuple[Slot, str]]:
    """File key -> (slot, leaf) for every tensor this adapter has of its own on this model."""
    out = {}
    for path, slot in slots.items():
        if name in slot.tied:
            continue
        for leaf in slot.saved(name):
            out[leaf_key(path, slot, slot.methods[name], leaf, files)] = (slot, leaf)
    return out


def leaf_key(path: str, slot: Slot, method: Method, leaf: str, files: Mapping[str, str]) -> str:
    """The file's name of one leaf; a parameter that is replaced whole goes by its own name."""
    key = method.key(leaf, slot.site.lookup)
    if method.leaves[leaf].shared:
        group = slot.group_of(method, leaf)
        return f"base_model.{key}.{group}" if group else f"base_model.{key}"
    if slot.site.whole and not path:
        return key  # as PEFT names what stands before the model
    if method.replaces and slot.raw and key == "modules_to_save.weight":
        return f"{PREFIX}{files.get(path, path)}"
    return f"{PREFIX}{files.get(path, path)}.{key.removeprefix('modules_to_save.')}"


def tied_copies(slots: Mapping[str, Slot], name: str) -> dict[str, Tensor]:
    """What PEFT's files hold of a head that follows an embedding's adapter: the same tensors once more, transposed."""
    out = {}
    for path, slot in slots.items():
        source = slot.tied.get(name)
        method = source.methods[name] if source else None
        flip = source is not None and source.site.lookup != slot.site.lookup
        p = method.transpose(source.params(name)) if flip else source.params(name) if source else None
        for leaf, t in (p or {}).items():
            if not method.follows:
                out[leaf_key(path, slot, method, leaf, {})] = slot.site.pack(t, method.leaves[leaf].axes).detach().to("cpu").contiguous().clone()
    return out


def carries_ties(slots: Mapping[str, Slot], name: str) -> bool:
    """Whether PEFT ties these targets as we do."""
    tied = [(s.tied[name], s) for s in slots.values() if name in s.tied]
    return all(a.methods[name].follows or a.methods[name].transpose(a.params(name)) is not None for a, _ in tied)


def file_paths(modules: Mapping[str, nn.Module], methods: Mapping[str, Method]) -> dict[str, str] | None:
    """Target -> its path in PEFT's files, for those that are read and not called; None where PEFT could not say it.

    PEFT adapts both projections of an attention or none; of several parameters of a module it wraps one around the other, in
    the order in which the module has them.
    """
    if all(m.replaces for m in methods.values()):
        return _copies(modules, methods)
    out: dict[str, str] = {}
    ends = {p.rpartition(".")[2] for p, m in methods.items() if isinstance(m, Around) and p}
    if ends and (len(ends) > 1 or [p for p in modules if p.rpartition(".")[2] in ends][-len(methods) :] != list(methods)):
        return None  # PEFT goes around the attentions of the last layers
    owners: dict[str, dict[str, str]] = {}
    for path, m in methods.items():
        at = None if m.replaces else place(modules, path)
        if at is not None and at.key:
            owners.setdefault(at.owner, {})[at.key] = path
    for owner, keys in owners.items():
        if inside := reads(modules[owner]):
            if set(keys) != set(inside) or "in_proj_weight" not in keys or len({str(methods[p].to_peft()) for p in keys.values()}) > 1:
                return None
            out |= {keys["in_proj_weight"]: owner, keys["out_proj"]: f"{owner}{NEST}.out_proj"}
            continue
        order = [k for k in modules[owner]._parameters if k in keys]
        out |= {keys[k]: owner + NEST * (len(order) - 1 - n) for n, k in enumerate(order)}
    return out


def _copies(modules: Mapping[str, nn.Module], methods: Mapping[str, Method]) -> dict[str, str] | None:
    """The paths where nothing but parameters is replaced whole, of modules (norms) that are nothing else: PEFT copies such a module."""
    owners: dict[str, list[str]] = {}
    for path in (p for p in methods if p not in modules):
        owners.setdefault(path.rpartition(".")[0], []).append(path.rpartition(".")[2])
    for owner, keys in owners.items():
        m = modules[owner]
        own = {k for k, t in [*m._parameters.items(), *m._buffers.items()] if t is not None}
        if not owner or own != set(keys) or any(not isinstance(child, Leaves | Holder) for child in m._modules.values()):
            return None
    return {f"{o}.{k}": f"{o}.{COPIES}.{k}" for o, keys in owners.items() for k in keys} if owners else None


def real_path(modules: Mapping[str, nn.Module], config: Mapping[str, Any], path: str) -> str:
    """The target that a path in PEFT's files means on this model; the path itself where it is no parameter's."""
    core, nested = path, 0
    while core.endswith(NEST):
        core, nested = core.removesuffix(NEST), nested + 1
    owner, _, last = core.rpartition(NEST + ".")
    if reads(modules.get(owner)):
        return f"{owner}.{last}"
    if reads(modules.get(core)):
        return f"{core}.in_proj_weight"
    wanted = config.get("target_parameters") or ()
    own = getattr(modules.get(core), "_parameters", {})
    mine = [f"{core}.{k}" for k in own if any(f".{core}.{k}".endswith(f".{w}") for w in wanted)]
    return mine[len(mine) - 1 - nested] if nested < len(mine) and not (plain(modules[core]) and mine == [f"{core}.weight"]) else path


def outside(config: Mapping[str, Any]) -> bool:
    """Whether PEFT keeps this adapter beside the model and not inside, so that its other keys lack `model.`."""
    return config.get("peft_type") in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT")


def written(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the keys that PEFT's file has for this configuration."""
    return {k.replace(PREFIX, "base_model.", 1) if outside(config) else k: t for k, t in tensors.items()}


def own_format(methods: Mapping[str, Method], fits: bool, tie: bool = False) -> bool:
    """Whether PEFT has no configuration that says all of this."""
    whole = all(m.replaces for m in methods.values())
    configs = [m.to_peft() for m in methods.values() if whole or not m.replaces]
    if not fits or any(c is None for c in configs):
        return True
    if whole:
        return False
    if any(isinstance(m, Around) for m in methods.values()):
        return len({str(c) for c in configs}) > 1 or any(m.replaces and not outside(configs[0]) for m in methods.values())
    main = {p: m for p, m in methods.items() if not m.replaces and "peft_type" in m.to_peft()}
    if not main or len({_kind(m) for m in main.values()}) > 1:
        return True
    said = next(iter(main.values())).to_peft()
    beside = {k for m in methods.values() if not m.replaces for k in m.to_peft()}
    return not beside <= said.keys() or (tie and "ensure_weight_tying" not in said)


def config_of(spec: Spec, model: nn.Module, methods: Mapping[str, Method], base: Mapping[str, Any], own: bool) -> dict[str, Any]:
    """adapter_config.json for methods at paths: PEFT's, or our own where PEFT's cannot say this."""
    common = {"base_model_name_or_path": base.get("name"), "revision": base.get("revision"), "task_type": base.get("task_type"),
              "inference_mode": True}
    if own:
        return common | {"peft_type": OWN, "lorakit_format": FORMAT, "modules": {p: m.to_dict() for p, m in methods.items()}, "ensure_weight_tying": spec.tie}
    modules = dict(model.named_modules())
    if around := {p: m for p, m in methods.items() if isinstance(m, Around)}:
        path, method = next(iter(around.items()))
        saved = sorted({(p if p in modules else place(modules, p).owner).rpartition(".")[2] for p, m in methods.items() if m.replaces})
        told = {"auto_mapping": None, "modules_to_save": saved or None} | common | site_at(modules, path).peft() | method.to_peft() | {"peft_version": "0.21.2"}
        return told | ({"adapter_layers": len(around)} if "adapter_layers" in told else {})
    if all(m.replaces for m in methods.values()):
        owners = {p: p if p in modules else p.rpartition(".")[0] for p in methods}
        names = list(dict.fromkeys(o for p, o in owners.items() if p not in modules))
        last = sorted({n.rpartition(".")[2] for n in names})
        short = last if {n for n in modules if n.rpartition(".")[2] in last} == set(names) else sorted(names)
        return common | {"auto_mapping": None, "peft_version": "0.21.2", "target_modules": short, "exclude_modules": None,
                         "modules_to_save": [p for p in methods if p in modules] or None} | next(iter(methods.values())).to_peft()
    every = {p: m.to_peft() for p, m in methods.items() if not m.replaces}
    configs = {p: c for p, c in every.items() if "peft_type" in c}
    first = methods[next(iter(configs))]
    patterns = {k: v for k, (v, _) in first.core.varies.items()}
    most = {k: Counter(c[k] for c in configs.values()).most_common(1)[0][0] for k in patterns.values()}
    at = {p: place(modules, p) for p in configs}
    parameters = sorted(p for p, a in at.items() if a.key and not reads(modules[a.owner]))
    layers = dict.fromkeys(at[p].owner for p in configs if p not in parameters)
    whole = {p: p if p in modules else place(modules, p).owner for p, m in methods.items() if m.replaces}
    saved = dict.fromkeys(owner for p, owner in whole.items() if p in modules or "bias" not in p.rpartition(".")[2])
    beside: dict[str, Any] = {"bias": "all"} if any(owner not in saved for owner in whole.values()) else {}
    for p, c in every.items():
        if p not in configs:  # what stands beside the main method: rows of a table by its path, biases
            beside |= {k: beside.get(k, {}) | {p: v} if isinstance(v, list) else v for k, v in c.items()}
    main = next(iter(configs.values())) | most | beside
    # anchored: PEFT lets a pattern match at the end of a path, so a short path must not catch a longer one
    for pattern, k in patterns.items():
        named = {p if p in parameters else at[p].owner: c[k] for p, c in configs.items()}
        if isinstance(most[k], bool):  # a list of the modules where it is so
            main = {n: v for n, v in main.items() if n != k} | {pattern: [p for p, v in named.items() if v]}
        else:
            main[pattern] = {f"{first.core.anchor}{p}": v for p, v in named.items() if v != most[k]}
    main = type(first.core).joined(main, {p: methods[p].core for p in configs})
    main |= {first.core.peft_dropout: 0.0 if parameters else spec.dropout} if first.core.peft_dropout else {}
    told = {"fan_in_fan_out": base.get("transposed", False), "target_parameters": parameters or None, "ensure_weight_tying": spec.tie}
    names = list(layers)
    if not any(isinstance(v, list) and v for k, v in main.items() if k in patterns):
        names = _shortest(names, [n for n, m in modules.items() if adaptable(m)]) if layers else []
    return common | {"auto_mapping": None, "peft_version": "0.21.2", "target_modules": names, "modules_to_save": list(saved) or None} | (
        dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")) if "bias" in main else {}) | main | {
        k: v for k, v in told.items() if k in main}


def _kind(method: Method) -> str:
    varying = {k for k, _ in method.core.varies.values()}
    return str(sorted((k, v) for k, v in method.to_peft().items() if k not in varying))


def _shortest(adapted: list[str], every: list[str]) -> list[str]:
    """Last names if they select exactly these modules among `every`, else whole paths."""
    last = {p.rsplit(".", 1)[-1] for p in adapted}
    return sorted(last) if {p for p in every if p.rsplit(".", 1)[-1] in last} == set(adapted) else sorted(adapted)


def read_tensors(path: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, all keys as of an adapter inside the model. LorakitError when it is missing, truncated or something else."""
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin")
        hint = "; there is a pickle (adapter_model.bin), which lorakit never opens: convert it to safetensors first" if pickled.exists() else ""
        raise LorakitError(f"{path.parent}: there is no {path.name}{hint}")
    try:
        with safe_open(path, "pt") as f:
            return {k.replace("base_model.", PREFIX, 1) if outside(config) else k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, RuntimeError) as e:
        raise LorakitError(f"{path} is truncated or not a safetensors file ({path.stat().st_size} bytes): {e}") from None


def warn_of(config: Mapping[str, Any], where: Path) -> None:
    """A warning for what the file says of training that is not carried out here; the function at inference does not depend on it."""
    if told := [k for k in ONLY_IN_TRAINING if config.get(k)]:
        warnings.warn(f"{where}: {', '.join(f'`{k}: {config[k]}`' for k in told)} has an effect in training only, and lorakit does not carry it out: the "
                      "adapter computes the same, but training goes on without it", stacklevel=3)


def restored(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors with every leaf in the form that the method has it in."""
    try:
        return tensors if config.get("peft_type") == OWN else method_from_peft(dict(config)).restored(dict(config), dict(tensors))
    except LorakitError:
        return tensors  # whoever reads the methods says what is wrong


def as_now(config: Mapping[str, Any], tensors: Mapping[str, Tensor], methods: Mapping[str, Method], model: nn.Module) -> tuple[Mapping[str, Tensor], int]:
    """A file's tensors with the factors of fused experts as PEFT lays them out since 0.19, and of how many targets they were not.

    Before, a stack (E, o, i) was read as (E, inputs, outputs), so that A (E r, o) and B (i, r E) make the update's transpose: A and B
    change places, each with the experts on the other side. Seen by the shapes; where o = i, by `peft_version`.
    """
    told = config.get("target_parameters")
    modules, out, many = dict(model.named_modules()) if told else {}, dict(tensors), 0
    files = file_paths(modules, methods) or {} if told else {}
    before = [int(n) if n.isdigit() else 0 for n in str(config.get("peft_version") or "0").split(".")[:2]] < [0, 19]
    for path in files:
        site, method = site_at(modules, path), methods[path]
        a, b = (f"{PREFIX}{files[path]}.{method.key(k)}" if k in method.leaves else "" for k in ("A", "B"))
        if not site.stack or site.transposed or a not in out or b not in out:
            continue
        A, B, E = out[a], out[b], site.stack[0]
        if (A.shape[1], B.shape[0]) == (site.out, site.in_) and (site.out != site.in_ or before) and len(A) == B.shape[1] == E * method.core.r:
            out[a] = B.unflatten(1, (-1, E)).permute(2, 1, 0).flatten(0, 1).contiguous()
            out[b] = A.unflatten(0, (E, -1)).permute(2, 1, 0).flatten(1).contiguous()
            many += 1
    return out, many


def packed(site: Any, method: Method, leaf: str, t: Tensor) -> Tensor:
    """A leaf in the layout of the file."""
    shape = method.owner(leaf).layout(leaf, site)
    return site.pack(t, method.leaves[leaf].axes) if shape is None else t.reshape(shape)


def unpacked(site: Any, method: Method, leaf: str, t: Tensor, shape: Any) -> Tensor:
    return site.unpack(t, method.leaves[leaf].axes) if method.owner(leaf).layout(leaf, site) is None else t.reshape(shape)


def kind(site: Any) -> str:
    """What PEFT calls a geometry, as far as it makes a difference."""
    if site.read:
        return "parameter"
    return "embedding" if site.lookup else f"conv{site.n}d" if site.slides else "transposed" if site.transposed else "linear"


def common(site: Any, method: Method) -> bool:
    """Whether PEFT computes this method on a target of this geometry as we do, so that its format can say it."""
    config = method.to_peft() or {}
    return site.common(config) and ("peft_type" not in config or isinstance(method, Around) or method.replaces or (
        kind(site) in method.core.peft_layers and method.core.on_peft(site)))


def methods_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path, model: nn.Module | None = None) -> dict[str, Method]:
    """Path -> method, from what the file holds: the tensors' own paths, and the configuration for their meaning.

    Without the model, parameters that are read and not called keep the paths that PEFT's files have for them.
    """
    if config.get("peft_type") == OWN:
        if config.get("lorakit_format", 0) > FORMAT:
            raise LorakitError(f"{where}: written in format {config['lorakit_format']}, this lorakit reads up to {FORMAT}; mend: upgrade lorakit")
        return {p: method_from_dict(m) for p, m in config["modules"].items()}
    try:
        method = method_from_peft(dict(config))
    except LorakitError as e:
        raise LorakitError(f"{where}: {e}") from None
    modules = {} if model is None else dict(model.named_modules())
    tails = sorted({method.key(leaf, lookup) for leaf in method.leaves for lookup in (False, True)}, key=len, reverse=True)
    paths = dict.fromkeys(real_path(modules, config, p) for k in tensors if (p := _path(k, tails)) is not None)
    plan = dict.fromkeys(paths, method)
    for what, (_, field) in method.core.varies.items():
        if isinstance(config.get(what), Mapping):
            for p, v in matched(f"{where}: {what}", config[what], list(paths), strict=False, names=named_as(modules, paths)).items():
                plan[p] = plan[p].having(**{field: float(v) if field == "alpha" else v})
    if type(method.core).at_peft is not Method.at_peft:
        for p in plan:
            keys = {leaf: f"{PREFIX}{p}.{method.key(leaf)}" for leaf in method.leaves}
            shapes = {leaf: tuple(tensors[k].shape) for leaf, k in keys.items() if k in tensors}
            plan[p] = plan[p].over_core(lambda core, shapes=shapes: core.at_peft(dict(config), shapes))
    if type(method.core).on is not Method.on and not isinstance(method, Around):
        plan = {p: m.on(site_at(modules, p)) if place(modules, p) else m for p, m in plan.items()}
    for k in (k for k in tensors if k.endswith(TOKENS_KEY)):
        p, told = k.removeprefix(PREFIX).removesuffix(TOKENS_KEY), config.get("trainable_token_indices") or ()
        rows = next((v for t, v in told.items() if f".{p}".endswith(f".{t}")), ()) if isinstance(told, Mapping) else told
        plan[p] = Tokens(tuple(rows), "out" if p in modules and not site_at(modules, p).lookup else "in")
    saved = set(config.get("modules_to_save") or ())
    for k in tensors:
        p, _, last = k.removeprefix(PREFIX).rpartition(".")
        if p in plan or not k.startswith(PREFIX) or any(part in k for part in TWICE):
            continue
        copy = method.replaces and p.endswith(f".{COPIES}")
        p = p.removesuffix(f".{COPIES}") if copy else p
        whole = copy or (_path(k, tails) is None and any(_inside(k, s) for s in saved))
        if whole or (config.get("bias") == "all" and "bias" in last and not p.endswith(NEST)):
            layer = p not in modules or adaptable(modules[p])
            plan[p if layer else f"{p}.{last}"] = (Full() if whole else BitFit()) if layer else Full(False, trains=last in modules[p]._parameters)
    return plan


def _inside(key: str, module: str) -> bool:
    path = f".{key.removeprefix(PREFIX)}"
    return f".{module}." in path and not any(part.startswith("lora_") for part in path.split("."))


def _path(key: str, tails: list[str]) -> str | None:
    if key in tails:
        return ""  # what stands before the model itself
    if not key.startswith(PREFIX):
        return None
    body = key.removeprefix(PREFIX)
    return next((body.removesuffix("." + t) for t in tails if body.endswith("." + t)), None)
