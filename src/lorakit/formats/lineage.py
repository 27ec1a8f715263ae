"""What came before an adapter: the earlier adapters it was trained on, under or over, applied in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lorakit import host
from lorakit.errors import LorakitError
from lorakit.formats.folder import Folder, load

HELD = ("continue", "mix")  # stages whose adapter is a part of the one that follows


def entry(folder: Folder, stage: str) -> list[dict[str, Any]]:
    """The lineage of an adapter trained from `folder` in this stage: the folder's own, and the folder."""
    receipt = folder.receipt or {}
    return [*receipt.get("lineage", []), {"adapter": str(folder.path), "stage": stage, "base": receipt.get("base", {}).get("digest"),
                                          "files": receipt.get("files")}]


def apply(model: nn.Module, lineage: Sequence[Mapping[str, Any]]) -> list[str]:
    """Brings a plain base to the state in which the last adapter was trained; names of the adapters now in effect, frozen.

    merge: that adapter (over those frozen so far) goes into the weights. freeze: it stays, each around the one before.
    continue, mix: nothing, for the adapter that follows holds it. Raises LorakitError if one is gone or changed since.
    """
    frozen: list[str] = []
    for n, step in enumerate(lineage):
        if step["stage"] in HELD:
            continue
        folder = Folder(step["adapter"])
        if step.get("files") and folder.receipt and folder.receipt.get("files") != step["files"]:
            raise LorakitError(f"{folder.path} changed since another adapter was trained on it; mend: bring back that version")
        name = f"before{n}"
        load(model, folder.path, name)
        state = host.state_of(model)
        for slot in host.slots(model, name).values():
            for t in slot.parameters(name).values():
                t.requires_grad_(False)
        frozen.append(name)
        state.active, state.chained = dict.fromkeys(frozen, 1.0), True
        if step["stage"] == "merge":
            host.merge(model)
            host.unload(model)
            frozen = []
    return frozen
