"""Quantised bases: a model's layers packed by a scheme, and back.

>>> import torch, lorakit
>>> model = lorakit.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), "nf4", target_modules="0")
>>> model[0].weight.shape, model[0].weight_codes.nbytes
(torch.Size([64, 64]), 2048)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import host
from lorakit.errors import LorakitError, near
from lorakit.sites import site_for
from lorakit.stores import guest
from lorakit.stores.layer import PREFIX, PackedLayer, packed_class
from lorakit.stores.scheme import Scheme, has_values, scheme_of
from lorakit.targets import select

__all__ = ["dequantize", "described", "forget", "note", "own_weights", "pack", "packed", "prepare", "quantize", "unpack"]


def _matrix(module: nn.Module, scheme: Scheme, path: str) -> tuple[tuple[int, int], bool]:
    """Shape of the matrix that a layer's weight is packed as, rows along its inputs, and whether that is the transposed weight."""
    where, site = path or type(module).__name__, site_for(module, path)
    W = module._parameters.get("weight")
    if W is None or not W.is_floating_point() or guest(module) is not None:
        raise LorakitError(f"{where}: its weight is no ordinary parameter, so it cannot be quantised{' again' if isinstance(module, PackedLayer) else ''}")
    turned = site.transposed and not site.lookup
    shape = tuple(W.shape) if site.lookup else (site.out, site.in_)
    try:
        scheme.fits(*shape)
    except LorakitError as e:
        raise LorakitError(f"{where}: {e}") from None
    return shape, turned


def _finite(W: Tensor, path: str) -> None:
    if has_values(W) and not torch.isfinite(W).all():
        raise LorakitError(f"{path}: the weight holds NaN or infinity, which cannot be quantised")


def prepare(module: nn.Module, scheme: Scheme, path: str = "") -> None:
    """Makes a layer one whose weight is packed, its parts on the meta device until they get values. LorakitError where the scheme cannot hold it."""
    shape, turned = _matrix(module, scheme, path)
    W = module._parameters.pop("weight")
    host.change_class(module, packed_class(type(module)))
    vars(module).update(scheme=scheme, shape=shape, raw=tuple(W.shape), turned=turned, compute=W.dtype, original=None)
    for k, (size, dtype) in scheme.layout(*shape).items():
        module.register_buffer(PREFIX + k, torch.empty(size, dtype=dtype, device="meta"))
    vars(module)["site"] = site_for(module)


@torch.no_grad()
def pack(module: nn.Module, scheme: Scheme, path: str = "", keep: bool = False) -> None:
    """Packs a layer's weight. keep: it stays at hand, on the CPU, for starts that want it. LorakitError for NaN, infinity, or what does not fit."""
    W = module._parameters.get("weight")
    if W is not None:
        _finite(W, path or type(module).__name__)
    prepare(module, scheme, path)
    module.site.store.fill(W)
    module.original = W.detach().cpu() if keep else None


def quantize(model: nn.Module, scheme: str | Mapping[str, Any] | Scheme | Sequence[Mapping[str, Any]] = "nf4", *,
             target_modules: str | Sequence[str] = "all-linear", exclude_modules: str | Sequence[str] = (), keep: bool = False) -> nn.Module:
    """Packs the weights of a model's layers (nf4, nf3, nf2; int8, int7, … int2), in place; returns the same model.

    Before adapters: `lorakit.quantize(model, "nf4")`, then `lorakit.adapt(model, …)` is QLoRA. Weights that are tied to another are left alone.
    scheme: one for all targets, or [{scheme, layers}, …] (as `lorakit.quantized.bits.allot` gives it). keep: the weights from before stay on the
    CPU, for starts made of them (init: loftq, lq-lora, lqer, l2qer, pissa with storage: base), until `forget`.
    Raises LorakitError, and changes nothing, for a layer that the scheme cannot hold.
    """
    base = host.bare(model)
    if host.find_state(base):
        raise LorakitError("the model has adapters already; mend: lorakit.quantize(model, …) first, then lorakit.adapt or lorakit.load")
    modules = dict(base.named_modules())
    if isinstance(scheme, str | Mapping | Scheme):
        plan = dict.fromkeys(own_weights(base, select(base, target_modules, exclude_modules)), scheme_of(scheme))
    else:
        plan = {p: scheme_of(group["scheme"]) for group in scheme for p in group["layers"]}
    if not plan:
        raise LorakitError("quantize: no layer is left whose weight is its own and not quantised yet")
    for p, how in plan.items():
        if p not in modules:
            raise LorakitError(f"quantize: the model has no module `{p}`{near(p, modules)}")
        _matrix(modules[p], how, p)
        _finite(modules[p]._parameters["weight"], p)
    for p, how in plan.items():
        pack(modules[p], how, p, keep=keep)
    note(base)
    return model


def forget(model: nn.Module) -> nn.Module:
    """Drops the weights from before quantisation that `keep` kept; returns the same model."""
    for layer in packed(model).values():
        layer.original = None
    return model


def own_weights(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Those of these layers whose weight is an ordinary parameter that nothing else in the model uses."""
    modules, uses = dict(model.named_modules()), Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [p for p in paths if uses[id(modules[p]._parameters.get("weight"))] == 1]


def note(model: nn.Module) -> None:
    """Where it is a model of transformers, its configuration says what is packed."""
    if hasattr(model, "config") and hasattr(model, "save_pretrained"):
        from lorakit.quantized.hub import write_config

        write_config(model)


def packed(model: nn.Module) -> dict[str, PackedLayer]:
    """Path -> layer of what is packed in a model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLayer)}


def described(model: nn.Module) -> list[dict[str, Any]]:
    """What is packed in a model, by scheme, as a file says it."""
    by: dict[str, list[str]] = {}
    for path, layer in packed(model).items():
        by.setdefault(json.dumps(layer.scheme.to_dict(), sort_keys=True), []).append(path)
    return [{"scheme": json.loads(k), "layers": v} for k, v in by.items()]


@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """Makes ordinary layers of the packed ones, with the numbers that they stand for; returns the same model."""
    base = host.bare(model)
    if host.find_state(base):
        raise LorakitError("the model has adapters; mend: lorakit.merge(model), which thaws the layers it writes, or lorakit.detach(model) first")
    for layer in packed(base).values():
        unpack(layer)
    note(base)
    return model


@torch.no_grad()
def unpack(layer: PackedLayer, W: Tensor | None = None) -> None:
    """Makes an ordinary layer of a packed one, with the numbers that it stands for, or W as its weight."""
    store = layer.site.store
    store.thaw(store.read() if W is None else W.to(store.device))
    host.change_class(layer, store.plain)
    for k in ("scheme", "site", "shape", "raw", "turned", "compute", "original"):
        vars(layer).pop(k)
