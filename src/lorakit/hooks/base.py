"""The contract of a hook and its registry.

Order within one optimiser step: before_forward (first micro-batch only) → forward, extra_loss, backward (every micro-batch)
→ clipping → before_step (gradients alive) → optimiser step → after_step (gradients still alive) → zero_grad → on_interval.
Several hooks run in the order they are given. Randomness comes from a generator that the hook seeds and keeps in its state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError, near

HOOKS: dict[str, type[Hook]] = {}


class Hook:
    """Does nothing; subclasses override what they need. Hyper-parameters are dataclass fields, the rest is state."""

    name: str
    title: str
    paper: str = ""
    formula: str = ""

    def setup(self, model: nn.Module) -> None:
        """Once, before the optimiser exists: may add or freeze parameters."""

    def param_groups(self, model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimiser's groups, from those made so far."""
        return groups

    def before_forward(self, model: nn.Module, step: int) -> None: ...

    def extra_loss(self, model: nn.Module, outputs: Any) -> Tensor | float:
        return 0.0

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None: ...

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None: ...

    def on_interval(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, step: int) -> None: ...

    def before_save(self, model: nn.Module, path: Path) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on to the bit: counters, masks, averages, generators."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def hook(name: str, title: str, paper: str = "", formula: str = "") -> Callable[[type], type]:
    """Class decorator: a dataclass registered under `name`."""

    def add(cls: type) -> type:
        cls = dataclass(cls)
        cls.name, cls.title, cls.paper, cls.formula, HOOKS[name] = name, title, paper, formula, cls
        return cls

    return add


def build(config: dict[str, dict[str, Any]] | str) -> Hook:
    """A hook from a configuration entry: "lora_plus" or {"lora_plus": {"ratio": 16}}."""
    name, options = (config, {}) if isinstance(config, str) else next(iter(config.items()))
    name = name.replace("-", "_")
    if name not in HOOKS:
        raise LorakitError(f"hooks: unknown hook `{name}`{near(name, HOOKS)}")
    fields = [f.name for f in dataclasses.fields(HOOKS[name])]
    for k in options or {}:
        if k not in fields:
            raise LorakitError(f"hooks: {name} has no option `{k}`{near(k, fields)}")
    return HOOKS[name](**(options or {}))
