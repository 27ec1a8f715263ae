"""An adapter's tensors under PEFT's keys, its folder, and `add_weighted_adapter`. Works on the base model that carries the adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from lorakit import host
from lorakit.compat.peft.config import LoraConfig, PeftConfig, plan_of
from lorakit.errors import LorakitError, near
from lorakit.formats import folder
from lorakit.formats.peft import PREFIX as WRAPPED
from lorakit.merges import ROWS
from lorakit.merges.base import At, Vector, project
from lorakit.merges.peft import Peft
from lorakit.method import Method
from lorakit.methods.lora import LoRA
from lorakit.recipes import compose
from lorakit.spec import attach

COMBINATIONS = {name.removeprefix("peft-").replace("-", "_"): cls for name, (cls, _) in ROWS.items() if issubclass(cls, Peft)}


def base_of(model: nn.Module) -> nn.Module:
    """The base inside a PeftModel, or the model itself where an adapter was injected."""
    model = getattr(model, "_orig_mod", model)
    get = getattr(model, "get_base_model", None)
    return model if get is None else get()


# Tensors by key

@contextmanager
def _holding(model: nn.Module, name: str, state_dict: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Inside, the adapter's tensors have the values of a full state dict of the model."""
    mine = {id(t) for s in host.slots(model, name).values() for t in s.whole(name).values()} if state_dict is not None else set()
    found = [(p, n) for n, p in model.named_parameters(remove_duplicate=False) if id(p) in mine and n in state_dict]
    if mine and not found:
        raise LorakitError(f"the state_dict has no tensor of the adapter `{name}`; mend: pass the whole model's state dict, or none")
    kept = [(p, p.data) for p, _ in found]
    for p, n in found:
        p.data = state_dict[n].to(p.device)
    try:
        yield
    finally:
        for p, data in kept:
            p.data = data


def tensors_of(model: nn.Module, name: str) -> folder.Export:
    """The adapter as it goes to a file: its `tensors` by key, and whether the layout is lorakit's `own`."""
    base = base_of(model)
    host.known(base, [name])
    return folder.Export(base, name)


def get_peft_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default",
                              unwrap_compiled: bool = False, save_embedding_layers: str | bool = "auto") -> dict[str, Tensor]:
    """One adapter's tensors under the keys of PEFT's files; without the prefix where the adapter was injected into a plain model."""
    no_embeddings(save_embedding_layers)
    with _holding(getattr(model, "_orig_mod", model), adapter_name, state_dict):
        tensors = tensors_of(model, adapter_name).tensors
    return tensors if hasattr(model, "get_base_model") else {k.removeprefix(WRAPPED): t for k, t in tensors.items()}


def set_peft_model_state_dict(model: nn.Module, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default",
                              ignore_mismatched_sizes: bool = False, low_cpu_mem_usage: bool = False) -> _IncompatibleKeys:
    """Sets one adapter's tensors; says which of its keys were missing and which given ones have no place."""
    base, now = base_of(model), tensors_of(model, adapter_name)
    given = {k if k.startswith("base_model.") else f"{WRAPPED}{k}": t for k, t in peft_model_state_dict.items()}
    missing, unexpected = [k for k in now.tensors if k not in given], [k for k in given if k not in now.tensors]
    if ignore_mismatched_sizes:
        other = [k for k in given if k in now.tensors and given[k].shape != now.tensors[k].shape]
        if other:
            warnings.warn(f"other shapes than the adapter `{adapter_name}` has, left as they were: {', '.join(other)}", stacklevel=2)
        given = {k: t for k, t in given.items() if k not in other}
    folder.put_tensors(base, adapter_name, now.tensors | {k: t for k, t in given.items() if k in now.tensors}, now.own, Path("state_dict"))
    return _IncompatibleKeys(missing, unexpected)


def no_embeddings(save_embedding_layers: str | bool) -> None:
    if save_embedding_layers is True:
        raise LorakitError("save_embedding_layers: an adapter's folder holds what its adapter trains; mend: modules_to_save with the embedding's name, "
                           "or trainable_token_indices")


# Folders

def save_folder(model: nn.Module, base: nn.Module, name: str, path: Path, config: PeftConfig, state_dict: Mapping[str, Tensor] | None) -> None:
    """Saves one adapter with its receipt; what the configuration says of the task and the base is kept."""
    here = type(base)
    said = {"task_type": config.task_type and config.task_type.value,
            "auto_mapping": None if config.task_type else {"base_model_class": here.__name__, "parent_library": here.__module__}}
    said |= {k: v for k in ("revision", "base_model_name_or_path") if (v := getattr(config, k)) is not None}
    with _holding(model, name, state_dict):
        folder.save(base, path, name, config=said)


def load_folder(base: nn.Module, name: str, path: Path, config: PeftConfig | None = None, check_base: bool = True) -> None:
    """Puts a saved adapter on the base and makes it the active one; `config` is read in place of the folder's."""
    if config is None:
        folder.load(base, path, name, check_base)
        return
    read = folder.Folder(path)
    spec, plan = plan_of(config, base)
    with host.tentative(base, name):
        attach(base, name, spec, plan, empty=True)
        folder.fill(base, name, read)


# Combinations

def _factors(slot: host.Slot, name: str) -> tuple[LoRA, Tensor, Tensor] | None:
    """Method, A and B of one adapter on one layer; None where it has none. LorakitError where it is no plain LoRA."""
    method = slot.methods.get(name)
    if method is None:
        return None
    if type(method) is not LoRA or method.lora_bias or slot.raw or slot.absorbed:
        what = "a module trained whole" if method.replaces else f"`{method.name}`" + (" with lora_bias" if getattr(method, "lora_bias", False) else "")
        raise LorakitError(f"{slot.path}: the adapter `{name}` is {what} there; add_weighted_adapter combines plain LoRA on layers only. "
                           "Mend: set_adapter([...]) to have several in effect, or merge one after the other")
    p = slot.params(name)
    return method, p["A"], p["B"]


def combine(slot: host.Slot, adapters: Sequence[str], weights: Sequence[float], rule: Peft, rank: int,
            options: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """A and B of the combination on one layer, at scale 1, by a rule of `lorakit.merges.peft`; where that is for a rank, of this rank."""
    parts = [(w, *f) for a, w in zip(adapters, weights, strict=True) if (f := _factors(slot, a))]
    if not parts:
        return None
    vectors = [Vector((B * m.s, A), scale=m.s) for _, m, A, B in parts]
    merged = rule.merge(vectors, [w for w, *_ in parts], At(slot.path))
    if not rule.lowers:
        return merged.factors[1], merged.factors[0]
    if options["svd_clamp"] is None:
        B, A, *_ = project(merged, rank)
        more = min(rank, *merged.shape) - A.shape[0]  # PEFT's factors have the rank that was asked for
        return F.pad(A, (0, 0, 0, more)), F.pad(B, (0, more))
    U, S, Vh = torch.linalg.svd(merged.dense(), full_matrices=options["svd_full_matrices"], driver=options["svd_driver"])
    k = min(rank, len(S))
    B, A = U[:, :k] * S[:k], Vh[:k]
    top = torch.quantile(torch.cat([B.flatten(), A.flatten()]), options["svd_clamp"])
    return A.clamp(-top, top), B.clamp(-top, top)


@torch.no_grad()
def add_weighted(base: nn.Module, configs: Mapping[str, LoraConfig], adapters: Sequence[str], weights: Sequence[float], name: str, kind: str = "svd",
                 rank: int | None = None, **options: Any) -> LoraConfig:
    """Puts the combination on the base as an adapter of its own, frozen; returns its configuration."""
    host.known(base, adapters)
    kind = "linear" if len(adapters) == 1 and kind in COMBINATIONS else kind
    if kind not in COMBINATIONS:
        raise LorakitError(f"add_weighted_adapter: combination_type `{kind}` is unknown{near(kind, COMBINATIONS)}; there are {', '.join(COMBINATIONS)}")
    if len(weights) != len(adapters):
        raise LorakitError(f"add_weighted_adapter: {len(adapters)} adapters but {len(weights)} weights")
    for a in adapters:
        if not isinstance(configs[a], LoraConfig):
            raise LorakitError(f"add_weighted_adapter: the adapter `{a}` is in lorakit's own format, which PEFT's configuration cannot say")
    ranks = [max(configs[a].r, *(configs[a].rank_pattern or {}).values(), 0) for a in adapters]
    rule = COMBINATIONS[kind](**{k: options.pop(k) for k in ("density", "majority_sign_method")})
    if rule.apart and len(set(ranks)) > 1:
        raise LorakitError(f"add_weighted_adapter: `{kind}` needs adapters of one rank, these have {', '.join(map(str, ranks))}; mend: combination_type='cat'")
    r = (rank or max(ranks)) if rule.lowers else ranks[0] if rule.apart else sum(ranks)
    new = {p: f for p, s in host.slots(base).items() if (f := combine(s, adapters, weights, rule, r, options))}
    plan: dict[str, Method] = {p: LoRA(A.shape[0], float(A.shape[0])) for p, (A, _) in new.items()}
    state = host.state_of(base)
    active = state.active
    spec = compose(LoRA(r, float(r)), target_modules=list(plan), dropout=state.specs[adapters[0]].dropout)
    attach(base, name, spec, plan, empty=True)
    state.active = active
    for path, slot in host.slots(base, name).items():
        for leaf, t in zip("AB", new[path], strict=True):
            slot.params(name)[leaf].copy_(t).requires_grad_(False)
    targets = [configs[a].target_modules for a in adapters]
    words = any(isinstance(t, str) for t in targets)
    return replace(configs[adapters[0]], r=r, lora_alpha=r, rank_pattern={}, alpha_pattern={}, use_rslora=False,
                   target_modules=set(plan) if words else set().union(*targets))
