"""Base + adapter -> merged checkpoint, file by file, without the model: memory for one weight at a time, whatever the model's size.

Every file of the base's folder is copied, then the weights that the adapter changes are written over their own bytes: a merged weight has the shape and dtype
of the one it replaces, so that headers, shards and indices stay as they are. The model is made on the meta device, for the layers' geometry alone.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.formats.files import new_folder, read_json
from lorakit.formats.folder import Folder, Part
from lorakit.sites import Site, adaptable, site_at
from lorakit.targets import weight_in

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a safetensors file."""

    file: Path
    start: int
    stop: int
    kind: str  # the dtype as the file names it
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        """Of floating-point numbers of at least 16 bits; None for what is none."""
        return _DTYPES.get(self.kind)

    def bytes(self) -> bytes:
        with self.file.open("rb") as f:
            f.seek(self.start)
            return f.read(self.stop - self.start)

    def read(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype)
        with self.file.open("rb") as f:
            f.seek(self.start)
            f.readinto(memoryview(out.view(-1).view(torch.uint8).numpy()))
        return out

    def write(self, value: Tensor) -> None:
        with self.file.open("r+b") as f:
            f.seek(self.start)
            f.write(memoryview(value.to(self.dtype).contiguous().view(-1).view(torch.uint8).numpy()))


def shards(folder: Path) -> list[Path]:
    """The safetensors files that make a folder's model: those its index names, else `model.safetensors`, else all."""
    if (index := folder / "model.safetensors.index.json").is_file():
        named = read_json(index).get("weight_map")
        names = sorted(set(map(str, named.values()))) if isinstance(named, Mapping) else []
        if not names or (gone := next((n for n in names if Path(n).name != n or not (folder / n).is_file()), None)):
            raise LorakitError(f"{folder}: {index.name} names {gone if names else 'no file'}, which is not there; mend: copy or download it again")
        return [folder / n for n in names]
    return [one] if (one := folder / "model.safetensors").is_file() else sorted(folder.glob("*.safetensors"))


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder's model. LorakitError where there is none, or a file is damaged."""
    out = {}
    for file in shards(folder):
        with file.open("rb") as f:
            try:
                size = struct.unpack("<Q", f.read(8))[0]
                header = json.loads(f.read(size)) if size <= file.stat().st_size else {"": None}
                found = {n: (tuple(at["shape"]), at["dtype"], *at["data_offsets"]) for n, at in header.items() if n != "__metadata__"}
            except (ValueError, TypeError, KeyError, struct.error) as e:
                raise LorakitError(f"{file} is no whole safetensors file: {e}") from e
        for name, (shape, dtype, a, b) in found.items():
            out[name] = entry = Entry(file, 8 + size + a, 8 + size + b, dtype, shape)
            if entry.stop > file.stat().st_size or (entry.dtype and b - a != math.prod(shape) * entry.dtype.itemsize):
                raise LorakitError(f"{file} is no whole safetensors file: {name} ends beyond it, or is not of its shape")
    if not out:
        raise LorakitError(f"{folder} has no safetensors file; mend: save it with transformers' save_pretrained first")
    return out


def checkpoint(folder: Path) -> dict[str, Any]:
    """The configuration of a whole model's folder. LorakitError where it is none, or quantised."""
    if not (folder / "config.json").is_file():
        raise LorakitError(f"{folder} holds no model: there is no config.json")
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise LorakitError(f"{folder} is quantised, and its numbers are no weights to add to; mend: the model from before, or lorakit merge without --streamed")
    return config


def copied(folder: Path, to: Path) -> dict[str, Entry]:
    """Copies a model's folder without what of its weights is kept a second time; the tensors of the copy."""
    weights = shards(folder)
    for f in folder.iterdir():
        if f.is_file() and f.suffix not in (".bin", ".pt", ".pth") and (f.suffix != ".safetensors" or f in weights):
            shutil.copyfile(f, to / f.name)
    return entries(to)


class Layout:
    """Where the targets of a model lie in its files. skeleton: the model on the meta device."""

    def __init__(self, skeleton: nn.Module, there: Mapping[str, Entry]):
        self.modules, self.there = dict(skeleton.named_modules()), there
        self.uses = Counter(id(t) for _, t in skeleton.named_parameters(remove_duplicate=False))

    def at(self, path: str) -> tuple[Site, str]:
        """The site of a target, and its weight's name in the files. LorakitError where it has none there, or shares it."""
        site, name = site_at(self.modules, path), weight_in(path, self.there)
        if self.uses[id(self.modules[path]._parameters.get("weight"))] > 1:
            raise LorakitError(f"{path}: its weight is tied to another, and merging would part them; mend: lorakit merge without --streamed")
        entry = self.there[name]
        if entry.dtype is None or entry.shape != site.store.shape:
            raise LorakitError(f"{name}: {list(entry.shape)} in {entry.file.name}, {list(site.store.shape)} in the model; mend: the base the adapter names")
        return site, name

    def sites(self) -> dict[str, tuple[str, Site]]:
        """Weight's name in the files -> path and site, of every layer that has its own there."""
        out = {}
        for path, module in self.modules.items():
            with suppress(LorakitError):
                if adaptable(module):
                    site, name = self.at(path)
                    out[name] = path, site
        return out


def finite(t: Tensor) -> bool:
    """Whether no number is NaN or infinity: their sum, which is quick, tells, or where it is too large for its dtype, each of them."""
    return math.isfinite(float(t.sum())) or bool(torch.isfinite(t).all())


def leaves_at(path: str, part: Part, site: Site) -> dict[str, Tensor]:
    """The leaves of an adapter's target as its method takes them. LorakitError where that is more than one weight's own."""
    method = part.method
    odd = [k for k, leaf in method.leaves.items() if leaf.shared or leaf.derived or (k not in part.leaves and not leaf.biased and not leaf.only)]
    if method.mergeable == "no" or odd or site.stack:
        raise LorakitError(f"{path}: {method.core.name} cannot be merged a weight at a time; mend: lorakit merge without --streamed, whose result can be mixed")
    p = {k: site.unpack(t, method.leaves[k].axes).float() for k, t in part.leaves.items()}
    if method.bias(p, None) is not None:
        raise LorakitError(f"{path}: {method.core.name} changes the bias, too; mend: lorakit merge without --streamed")
    return p


def _merged(path: str, part: Part, site: Site, W: Tensor) -> Tensor:
    method, p = part.method, leaves_at(path, part, site)
    V = site.unview(method.weight(p, site.view(W).float()))
    if not finite(V):
        raise LorakitError(f"{path}: the merged weight is not finite (NaN or infinity in the adapter?)")
    return V


@torch.no_grad()
def merge_checkpoint(base: str | Path, adapter: str | Path, output: str | Path, skeleton: nn.Module) -> list[str]:
    """Writes base + adapter as a checkpoint folder like the base's, and returns the names of the weights that changed.

    base: a folder of safetensors; skeleton: the base's model on the meta device. The output appears whole or not at all. LorakitError where the adapter is
    none of one weight at a time (shared tensors, biases, tied weights, what depends on its input), or the base is quantised or lacks a target.
    """
    base, folder, changed = Path(base), Folder(adapter), []
    checkpoint(base)
    with new_folder(Path(output)) as tmp:
        layout = Layout(skeleton, copied(base, tmp))
        for path, part in folder.parts().items():
            site, name = layout.at(path)
            entry = layout.there[name]
            entry.write(_merged(path, part, site, entry.read()))
            changed.append(name)
    return changed
