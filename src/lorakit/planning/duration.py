"""Time of a training step, from a short calibration on this machine: the same model with one and with two layers, extrapolated.

    t(L) = t(1) + (L - 1) (t(2) - t(1))

Both have random weights and the widths of the real one, so two layers' memory is enough, whatever the model's depth. What all layers do
not do alike (a pattern of sliding windows, an encoder beside a decoder) is outside this rule.
"""

from __future__ import annotations

import copy
import statistics
import time
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
    """What a step takes here. at_least: seconds of measuring for each of the two small models; the median of its steps counts."""
    config = config_of(base, task)
    kind = dtype_of(dtype)
    kind = (config.dtype or torch.float32) if kind == "auto" else kind
    layers = config.get_text_config().num_hidden_layers
    told = []
    for n in (1, 2):
        model = getattr(transformers, TASKS[task]).from_config(shallow(config, n), dtype=kind).train()
        if quantize is not None:
            api.quantize(model, quantize)
        if adapter is not None:
            api.adapt(model, adapter, **options)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        told.append(_measure(model, batch, length, at_least))
        del model
    step = told[0] + (layers - 1) * max(told[1] - told[0], 0.0)
    return Time(step, batch * length / step)


def shallow(config: Any, layers: int) -> Any:
    """A copy of a configuration with so many layers."""
    out = copy.deepcopy(config)
    text = out.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return out


def _measure(model: nn.Module, batch: int, length: int, at_least: float) -> float:
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    labels = labels_for(model, ids)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    took: list[float] = []
    while len(took) < 4 or sum(took) < at_least:
        begun = time.perf_counter()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        took.append(time.perf_counter() - begun)
    return statistics.median(took[1:])  # the first one warms up
