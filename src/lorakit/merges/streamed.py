"""Base + adapter -> merged checkpoint, file by file, without the model: memory for one weight at a time, whatever the model's size.

Every file of the base's folder is copied, then the weights that the adapter changes are written over their own bytes: a merged weight has the shape and dtype
of the one it replaces, so that headers, shards and indices stay as they are. The model is made on the meta device, for the layers' geometry alone.
"""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.formats.files import new_folder
from lorakit.formats.folder import Folder, Part
from lorakit.sites import Site, site_at
from lorakit.targets import weight_in

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a safetensors file."""

    file: Path
    start: int
    stop: int
    dtype: torch.dtype | None
    shape: tuple[int, ...]

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


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder's safetensors files."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            size = struct.unpack("<Q", f.read(8))[0]
            try:
                header = json.loads(f.read(size))
            except ValueError as e:
                raise LorakitError(f"{file} is no whole safetensors file: {e}") from e
        for name, at in header.items():
            if name != "__metadata__":
                a, b = at["data_offsets"]
                out[name] = Entry(file, 8 + size + a, 8 + size + b, _DTYPES.get(at["dtype"]), tuple(at["shape"]))
    return out


def _merged(path: str, part: Part, site: Site, W: Tensor) -> Tensor:
    method = part.method
    odd = [k for k, leaf in method.leaves.items() if leaf.shared or leaf.derived or (k not in part.leaves and not leaf.biased and not leaf.only)]
    if method.mergeable == "no" or odd or site.stack:
        raise LorakitError(f"{path}: {method.core.name} cannot be merged a weight at a time; mend: lorakit merge without --streamed")
    p = {k: site.unpack(t, method.leaves[k].axes).float() for k, t in part.leaves.items()}
    if method.bias(p, None) is not None:
        raise LorakitError(f"{path}: {method.core.name} changes the bias, too; mend: lorakit merge without --streamed")
    V = site.unview(method.weight(p, site.view(W).float()))
    if not torch.isfinite(V).all():
        raise LorakitError(f"{path}: the merged weight is not finite (NaN or infinity in the adapter?)")
    return V


@torch.no_grad()
def merge_checkpoint(base: str | Path, adapter: str | Path, output: str | Path, skeleton: nn.Module) -> list[str]:
    """Writes base + adapter as a checkpoint folder like the base's, and returns the names of the weights that changed.

    base: a folder of safetensors; skeleton: the base's model on the meta device. The output appears whole or not at all. LorakitError where the adapter is
    none of one weight at a time (shared tensors, biases, tied weights, what depends on its input), or the base is quantised or lacks a target.
    """
    base, folder = Path(base), Folder(adapter)
    if not (base / "config.json").is_file():
        raise LorakitError(f"{base} holds no model: there is no config.json")
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        raise LorakitError(f"{base} is quantised; mend: lorakit merge without --streamed, or the base from before")
    modules, changed = dict(skeleton.named_modules()), []
    uses: dict[int, int] = {}
    for _, t in skeleton.named_parameters(remove_duplicate=False):
        uses[id(t)] = uses.get(id(t), 0) + 1
    with new_folder(Path(output)) as tmp:
        for f in base.iterdir():
            if f.is_file() and f.suffix not in (".bin", ".pt", ".pth"):
                shutil.copyfile(f, tmp / f.name)
        there = entries(tmp)
        if not there:
            raise LorakitError(f"{base} has no safetensors file; mend: save it with transformers' save_pretrained first")
        for path, part in folder.parts().items():
            site, name = site_at(modules, path), weight_in(path, there)
            if uses.get(id(modules[path]._parameters.get("weight")), 1) > 1:
                raise LorakitError(f"{path}: its weight is tied to another, and merging would part them; mend: lorakit merge without --streamed")
            entry = there[name]
            if entry.dtype is None or entry.shape != site.store.shape:
                raise LorakitError(f"{name}: {list(entry.shape)} in {entry.file.name}, {list(site.store.shape)} in the model; mend: the base the adapter names")
            entry.write(_merged(path, part, site, entry.read()))
            changed.append(name)
    return changed
