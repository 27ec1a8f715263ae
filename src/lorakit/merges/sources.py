"""Where task vectors come from: an adapter's folder read without its base, or an adapter on a model. One target is read at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from lorakit import host
from lorakit.errors import LorakitError
from lorakit.formats.folder import Folder
from lorakit.maps import each
from lorakit.merges.base import Vector
from lorakit.method import Additive, Method
from lorakit.methods.lora import LoRA


class Source(Protocol):
    """An adapter as task vectors."""

    name: str
    paths: list[str]

    def vector(self, path: str) -> Vector:
        """What it adds to the weight of one of its targets. LorakitError where no matrix can say it, or it holds NaN or infinity."""
        ...

    def copy(self, path: str) -> tuple[Method, Mapping[str, Tensor]] | None:
        """A target that it has whole (a head): the method and its leaves. None where it adapts it, or lacks it."""
        ...


def _wide(t: Tensor) -> Tensor:
    """At least float32, so that a weight or a scale rounds nothing."""
    return t.float() if t.is_floating_point() and t.element_size() < 4 else t


def _check(name: str, path: str, method: Method) -> None:
    if method.mergeable == "no":
        raise LorakitError(f"{name}: {path or 'the model'}: {method.core.name} depends on its input, so that no matrix stands for it and it cannot be mixed; "
                           "mend: leave this adapter out")


def _biased(name: str, path: str, method: Method) -> LorakitError:
    return LorakitError(f"{name}: {path}: {method.core.name} changes the bias, which no mix of weights holds; mend: leave this adapter out, or merge it")


class InFolder:
    """A saved adapter, without its base. Its tensors stay in the file until their target's turn comes."""

    def __init__(self, folder: Folder):
        self.folder, self.name, self.parts = folder, str(folder.path), folder.parts()
        self.paths = list(self.parts)
        if folder.config.get("ensure_weight_tying"):
            raise self._needs_base("a head follows the adapter of its tied embedding")
        if folder.config.get("target_parameters"):
            raise self._needs_base("it adapts parameters that are read, not called")

    def _needs_base(self, why: str) -> LorakitError:
        return LorakitError(f"{self.name}: {why}, so that the base is needed to mix or compare it; mend: base=, or --base")

    def copy(self, path: str) -> None:
        """Without the base none can be written; `vector` says so."""

    def vector(self, path: str) -> Vector:
        part = self.parts[path]
        method, p = part.method, {k: _wide(t.flatten(1) if t.dim() > 2 else t) for k, t in part.leaves.items()}
        for key, t in part.keyed(path).items():
            if not torch.isfinite(t).all():
                raise LorakitError(f"{self.name}: `{key}` holds NaN or infinity")
        _check(self.name, path, method)
        if method.replaces or method.reads_base:
            raise self._needs_base(f"{path}: what {method.core.name} adds depends on the weight")
        if type(method) is LoRA and ("A" not in p or "B" not in p or p["A"].shape[0] != method.r or p["B"].shape[1] != method.r):
            shapes = " and ".join(str(list(t.shape)) for t in p.values())
            raise LorakitError(f"{self.name}: {path}: factors of shapes {shapes or 'none'} are no LoRA of rank {method.r} on a layer")
        if method.bias(p, None) is not None:
            raise _biased(self.name, path, method)
        odd = any(t.dim() > 2 for t in part.leaves.values()) and type(method) is not LoRA
        odd = odd or any((k not in p and not leaf.only) or set("oi") <= set(leaf.axes.split()) for k, leaf in method.leaves.items())
        if odd:
            raise self._needs_base(f"{path}: {method.core.name} does not keep all that makes its update in its own tensors")
        return factored(method, p) or self._dense(path, method, p)

    def _dense(self, path: str, method: Method, p: dict[str, Tensor]) -> Vector:
        def weight() -> Tensor:
            raise self._needs_base(f"{path}: what {method.core.name} adds depends on the weight")

        if not isinstance(method, Additive):
            weight()
        return Vector(matrix=method.delta(p, weight))


class OnModel:
    """An adapter on a model."""

    def __init__(self, model: nn.Module, name: str, title: str = ""):
        self.adapter, self.name = name, title or f"adapter `{name}`"
        self.slots = {p: s for p, s in host.slots(model, name).items() if name not in s.tied}
        self.paths = list(self.slots)

    def _read(self, path: str) -> tuple[Method, dict[str, Tensor]]:
        slot = self.slots[path]
        method, p = slot.methods[self.adapter], slot.params(self.adapter)
        for k, t in p.items():
            if not torch.isfinite(t).all():
                raise LorakitError(f"{self.name}: {path}: `{method.key(k, slot.site.lookup)}` holds NaN or infinity")
        return method, p

    def copy(self, path: str) -> tuple[Method, Mapping[str, Tensor]] | None:
        return self._read(path) if path in self.slots and self.slots[path].methods[self.adapter].replaces else None

    def vector(self, path: str) -> Vector:
        slot = self.slots[path]
        (method, p), site = self._read(path), slot.site
        _check(self.name, path, method)
        if slot.absorbed and slot.absorbed.adapter == self.adapter:
            raise LorakitError(f"{self.name}: {path}: its start was taken out of the base in memory; mend: lorakit.save it, and mix the folder")
        if method.bias(p, site.bias) is not site.bias:
            raise _biased(self.name, path, method)
        if not method.replaces and method.two(slot.first(self.adapter)) is not None:
            return factored(method, p, slot)
        W = slot.map({}).weight()
        return Vector(matrix=each(site, method, method.weight, p, W) - W)


def factored(method: Method, p: Mapping[str, Tensor], slot: host.Slot | None = None) -> Vector | None:
    """The product of two factors that an update is; None where it is none."""
    two = method.two(dict(p)) if slot is None else each(slot.site, method, method.two, dict(p))
    return two and Vector(tuple(t.detach() for t in two), scale=method.s if type(method) is LoRA else 1.0)
