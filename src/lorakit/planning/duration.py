"""Time of a training step, from a short calibration on this machine: the same model with one and with two layers, extrapolated.

    t(L) = t(1) + (L - 1) (t(2) - t(1))

Both have random weights and the widths of the real one, so three layers' memory is enough, whatever the model's depth. They step in turn, and the
difference is the median of the rounds', so that what else the machine does slows both. What all layers do not do alike (a pattern of
sliding windows, an encoder beside a decoder) is outside this rule.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lorakit import api
from lorakit.models import TASKS, dtype_of
from lorakit.planning.memory import config_of, labels_for


@dataclass(frozen=True)
class Time:
    """Seconds of one training step (forward, backward, optimiser) and the tokens of it in a second."""

    step: float
    tokens_per_second: float


def seconds(base: str | Path, adapter: str | Any = "lora", *, task: str = "causal-lm", batch: int = 8, length: int = 512, dtype: str | None = None,
            gradient_checkpointing: bool = False, quantize: str | Any = None, at_least: float = 1.0, **options: Any) -> Time:
    """What a step takes here. at_least: seconds of measuring for each of the two small models."""
    config = config_of(base, task)
    kind = dtype_of(dtype)
    kind = (config.dtype or torch.float32) if kind == "auto" else kind
    layers = config.get_text_config().num_hidden_layers
    steps = []
    for n in (1, 2):
        model = getattr(transformers, TASKS[task]).from_config(shallow(config, n), dtype=kind).train()
        if quantize is not None:
            api.quantize(model, quantize)
        if adapter is not None:
            api.adapt(model, adapter, **options)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        steps.append(stepping(model, batch, length))
    rounds: list[tuple[float, float]] = []
    while len(rounds) < 4 or sum(map(sum, rounds)) < 2 * at_least:
        rounds.append((steps[0](), steps[1]()))
    step = extrapolated(rounds[1:], layers)  # the first one warms up
    return Time(step, batch * length / step)


def extrapolated(rounds: Sequence[tuple[float, float]], layers: int) -> float:
    """The step of so many layers, from those of one and of two in turn."""
    return statistics.median(one for one, _ in rounds) + (layers - 1) * max(statistics.median(two - one for one, two in rounds), 0.0)


def shallow(config: Any, layers: int) -> Any:
    """A copy of a configuration with so many layers."""
    out = copy.deepcopy(config)
    text = out.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return out


def stepping(model: nn.Module, batch: int, length: int) -> Callable[[], float]:
    """Takes a step, and says how long it took."""
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    labels = labels_for(model, ids)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        begun = time.perf_counter()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begun

    return step
