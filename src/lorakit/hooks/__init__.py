"""What happens while training: one file per hook. A hook overrides what it needs of `Hook`; everything else does nothing."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

for _found in iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")

from lorakit.hooks.base import HOOKS, Hook, Hooks, build, hook, hooked  # noqa: E402
from lorakit.hooks.lora_plus import LoRAPlus  # noqa: E402

__all__ = ["HOOKS", "Hook", "Hooks", "LoRAPlus", "build", "hook", "hooked"]
