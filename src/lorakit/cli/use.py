"""What the verbs that run a model share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lorakit import api
from lorakit.errors import LorakitError
from lorakit.formats import lineage
from lorakit.formats.folder import Folder
from lorakit.models import load_base, load_tokenizer
from lorakit.proof import load_base_for


def base_of(adapter: Path, base: str | None) -> str:
    """The base to use with an adapter. LorakitError if neither the user nor the adapter says."""
    told = base or Folder(adapter).config.get("base_model_name_or_path")
    if not told:
        raise LorakitError(f"{adapter} does not say which base it belongs to; mend: give --base")
    return told


def model_for(adapter: Path, base: str | None, dtype: str | None = None) -> nn.Module:
    """The base model of an adapter, of the right task."""
    return load_base_for(Folder(adapter), base, None if dtype == "auto" else dtype)


def ready(adapter: Path | None, base: str | None, check: bool = True) -> tuple[nn.Module, Any]:
    """(model with the adapter in effect, tokenizer)."""
    if adapter is None:
        name = base or "embedded"
        return load_base(name, dtype="float32"), load_tokenizer(name)
    model, folder = model_for(adapter, base, "float32"), Folder(adapter)
    steps = [s for s in (folder.receipt or {}).get("lineage", []) if s["stage"] == "freeze"]
    frozen = lineage.apply(model, steps)
    api.load(model, adapter, check_base=check)
    return api.activate(model, *frozen, "default", chain=bool(frozen)), load_tokenizer(base_of(adapter, base))
