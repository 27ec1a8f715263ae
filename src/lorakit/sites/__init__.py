"""Geometry: a target seen as a canonical (o, i) matrix, or a stack of them. The only place that knows layer types.

A target is a layer that is called with its input, or a parameter that its module's own forward reads. A site answers how a
matrix, or a chain of factors, acts on the input; it knows nothing of methods.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from lorakit.errors import LorakitError
from lorakit.sites.layers import Conv1DSite, ConvSite, EmbeddingSite, ScaledEmbeddingSite, Site
from lorakit.sites.parameters import OutProjectionSite, ParameterSite
from lorakit.sites.rows import NO_ROWS, Batch, batch_of
from lorakit.sites.whole import Call, WholeSite, whole_site

__all__ = ["NO_ROWS", "SITES", "Batch", "Call", "Place", "Site", "WholeSite", "adaptable", "batch_of", "check_caller", "fused", "linear_like", "named_as",
           "place", "plain", "reads", "site_at", "site_for", "whole_site"]

SITES: dict[str, type[Site]] = {
    "torch.nn.modules.linear.Linear": Site,
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": Site,
    "torch.nn.modules.sparse.Embedding": EmbeddingSite,
    "torch.nn.modules.conv.Conv1d": ConvSite,
    "torch.nn.modules.conv.Conv2d": ConvSite,
    "torch.nn.modules.conv.Conv3d": ConvSite,
    "transformers.pytorch_utils.Conv1D": Conv1DSite,
    "bitsandbytes.nn.modules.Linear4bit": Site,
    "bitsandbytes.nn.modules.Linear8bitLt": Site,
    "hqq.core.quantize.HQQLinear": Site,
}
SCALED = re.compile(r"ScaledWordEmbedding$")  # a class of transformers, one for each model, that multiplies by `embed_scale`
FUSES = ("torch.nn.modules.transformer.TransformerEncoderLayer",)  # fast path in evaluation: one kernel over all weights
EXPERTS = re.compile(r"Experts$")  # classes of transformers 5 that keep all experts in one parameter


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def _site_class(cls: type) -> type[Site] | None:
    if SCALED.search(cls.__name__) and issubclass(cls, nn.Embedding):
        return ScaledEmbeddingSite
    return next((SITES[n] for n in map(_qualified, cls.__mro__) if n in SITES), None)


def adaptable(module: nn.Module) -> bool:
    """Whether there is a site for this layer's class."""
    return _site_class(type(module)) is not None


def linear_like(module: nn.Module) -> bool:
    """Whether the layer is a plain matrix product: no look-up, no sliding window."""
    site = _site_class(type(module))
    return site is not None and not site.lookup and not site.slides


def plain(module: nn.Module) -> bool:
    """Whether a layer's weight, as it is stored, is the canonical matrix."""
    return _site_class(type(module)) is Site


def reads(module: nn.Module | None) -> dict[str, str]:
    """Target's name inside the module -> parameter, for what a module reads of its own and its children's weights without calling them."""
    if not isinstance(module, nn.MultiheadAttention):
        return {}
    packed = ("in_proj_weight",) if module._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return {n: n for n in packed} | {"out_proj": "out_proj.weight"}


def fused(module: nn.Module) -> list[str]:
    """Names of the parameters that hold the matrices of all experts."""
    mine = any(EXPERTS.search(c.__name__) for c in type(module).__mro__)
    return [n for n, p in module._parameters.items() if mine and p is not None and p.dim() == 3]


@dataclass(frozen=True)
class Place:
    """Where a target is: `owner` is the layer that is called, or the module that reads `parameter`, which it knows as `key`."""

    owner: str
    key: str = ""
    parameter: str = ""


def place(modules: Mapping[str, nn.Module], path: str) -> Place | None:
    """The place of a module's or a parameter's path; None where the model has neither."""
    above, _, last = path.rpartition(".")
    parent = modules.get(above)
    if last in (inside := reads(parent)):
        return Place(above, last, inside[last])
    if path in modules:
        return Place(path)
    if parent is not None and (parent._parameters.get(last) is not None or parent._buffers.get(last) is not None):
        return Place(above, last, last)
    return None


def named_as(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> dict[str, str]:
    """Target -> the name that patterns know it by: what an attention reads goes by the attention's."""
    at = {p: place(modules, p) for p in paths}
    return {p: a.owner if a and a.key and reads(modules[a.owner]) else p for p, a in at.items()}


def site_at(modules: Mapping[str, nn.Module], path: str) -> Site:
    """The site of a target. LorakitError where there is none."""
    at = place(modules, path)
    if at is None:
        raise LorakitError(f"the model has no module or parameter `{path}`")
    if not at.key:
        return site_for(modules[at.owner], path)
    inner, _, name = at.parameter.rpartition(".")
    kind = OutProjectionSite if reads(modules[at.owner]) and inner else ParameterSite
    return kind(modules[at.owner].get_submodule(inner), name)


def check_caller(modules: Mapping[str, nn.Module], path: str) -> None:
    """LorakitError where a module around a target reads its weight without calling what is between."""
    above = path
    while above and torch.backends.mha.get_fastpath_enabled():
        above = above.rpartition(".")[0]
        if above in modules and _qualified(type(modules[above])) in FUSES:
            raise LorakitError(f"{path}: {type(modules[above]).__name__} reads this layer's weight without calling it when it evaluates, so an adapter "
                               "would be skipped silently; mend: torch.backends.mha.set_fastpath_enabled(False) first")


def site_for(module: nn.Module, path: str = "") -> Site:
    """The site of a layer. LorakitError for an unknown layer, or one whose class computes something of its own."""
    cls = type(module)
    while hasattr(cls, "own_class"):  # what an adapted or packed layer was
        cls = cls.own_class
    if _site_class(cls) is ScaledEmbeddingSite:
        return ScaledEmbeddingSite(module)
    for base in cls.__mro__:
        name = _qualified(base)
        if name in SITES:
            if cls.forward is not base.forward:
                raise LorakitError(f"{path or cls.__name__}: {_qualified(cls)} has a forward of its own, not {base.__name__}'s; an adapter would "
                                   f"compute something else. Mend: name its parameter instead, target_parameters: [{path.rpartition('.')[2]}.weight], or "
                                   "register a Site for it in lorakit.sites.SITES")
            return SITES[name](module)
    if kind := whole_site(module):
        return kind(module)
    known = ", ".join(n.rsplit(".", 1)[1] for n in SITES)
    raise LorakitError(f"{path or 'this module'} is a {cls.__name__}; adapters can be put on {known}, and on any parameter by name (target_parameters)")
