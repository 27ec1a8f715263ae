"""What happens while training: one file per hook. A hook overrides what it needs of `Hook`; everything else does nothing."""

from __future__ import annotations

from lorakit.hooks.base import HOOKS, Hook, hook
from lorakit.hooks.lora_plus import LoRAPlus

__all__ = ["HOOKS", "Hook", "LoRAPlus", "hook"]
