"""The PEFT adapter folder as a format among others: read with its receipt, written beside a base by `folder.save`, or without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lorakit.errors import LorakitError
from lorakit.formats import folder, peft
from lorakit.formats.base import Format, lora_of
from lorakit.formats.files import sha256, write_json
from lorakit.formats.folder import Folder, Part, beside
from lorakit.spec import Spec


class Peft(Format):
    name = "peft"
    looks_for = f"a folder with {peft.CONFIG} and {peft.TENSORS}"
    ties = parameters = True

    def found(self, path):
        return Folder.there(path) or ((path / peft.CONFIG).is_file() and not any(path.glob("adapters.safetensors")))

    def read(self, path, model):
        read = Folder(path)
        if model is not None:
            read.bind(model)
        return read

    def unfit(self, part):
        return None

    def write(self, source, out, model, **options: Any):
        return write(source, out, model)


def write(source: Folder, out: Path, model: nn.Module | None, **config: Any) -> list[str]:
    """Writes an adapter as a PEFT folder into `out`. config: keys of adapter_config.json that are known better.

    With the base at hand it is a save like any other, with a receipt. Without, only LoRA and DoRA can be written, the receipt is
    the source's, and target_modules are whole paths.
    """
    lineage = (source.receipt or {}).get("lineage", ())
    if model is not None:
        with beside(model, source, check_base=False) as name:  # whoever reads it back checks the base
            folder.save(model, out, name, lineage=lineage, config=config)
        return ["PEFT has no configuration for this adapter: written in lorakit's own layout"] if Folder(out).own else []
    parts = source.parts()
    if why := next((p for p, part in parts.items() if not lora_of(part.method) or not part.leaves), None):
        raise LorakitError(f"{why}: {parts[why].method.card.title} can be written as a PEFT folder only beside its base; mend: give base")
    methods, tree = {p: part.method for p, part in parts.items()}, skeleton(parts)
    if peft.own_format(methods, True):
        raise LorakitError(f"{source.path}: its targets are of several kinds, which PEFT has no configuration for; mend: give base, or rank=R for plain LoRA")
    told = {"name": source.base, "revision": source.config.get("revision"), "task_type": source.config.get("task_type"),
            "transposed": source.config.get("fan_in_fan_out", False)}
    main = {"target_modules": list(parts)} | config
    written = peft.config_of(Spec(next(iter(methods.values())), tuple(parts), dropout=source.dropout), tree, methods, told, False) | main
    save_file({k: t.contiguous() for p, part in parts.items() for k, t in part.keyed(p).items()}, str(out / peft.TENSORS), metadata={"format": "pt"})
    write_json(out / peft.CONFIG, written)
    if source.receipt is None or source.changed:
        return ["no receipt: neither a base nor the source's own receipt is at hand; mend: give base"]
    files = {n: sha256(out / n) for n in (peft.TENSORS, peft.CONFIG)}
    keys = {k: list(t.shape) for p, part in parts.items() for k, t in part.keyed(p).items()}
    write_json(out / peft.RECEIPT, source.receipt | {"files": files, "keys": keys})
    return []


@torch.no_grad()
def skeleton(parts: dict[str, Part]) -> nn.Module:
    """Modules at the paths of an adapter's targets, of the right kind, without weights: what can be known of a base that is not there."""
    root = nn.Module()
    for path, part in parts.items():
        *above, last = path.split(".")
        at = root
        for name in above:
            at._modules.setdefault(name, nn.Module())
            at = at._modules[name]
        n = max(t.dim() for t in part.leaves.values()) - 2 if part.leaves else 0
        o = part.leaves["m"].numel() if "m" in part.leaves else 1  # all that a reader asks for
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1] if n > 0 else None
        at._modules[last] = nn.Embedding(1, o, device="meta") if part.lookup else conv(1, o, 1, device="meta") if conv else nn.Linear(1, o, device="meta")
    return root
