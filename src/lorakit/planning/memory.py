"""Memory of a training step, exact to the byte for what torch allocates, without allocating it.

The model is made from its configuration with tensors that have shapes and no values, one step runs forward and backward on it, and
what is alive is counted. The kernels are those of the device, so what attention keeps is right too. Not counted: Python and its
libraries, and what a kernel takes for itself while it runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit import api
from lorakit.errors import LorakitError, near
from lorakit.models import TASKS, dtype_of, where

STATES = {"adamw": 2, "sgd": 0}  # optimiser -> numbers it keeps for each one that trains
SCRATCH = {"adamw": 2, "sgd": 1}  # … and needs for a moment while it steps all tensors at once


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step; `trainable` counts numbers. `saved` is what the forward pass keeps for the backward pass."""

    trainable: int
    base: int
    adapter: int
    gradients: int
    optimizer: int
    saved: int
    logits: int
    peak: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, now and at most, among those made inside; views count once, those of the model's own not at all.

    What has gone is only looked for when the peak may have moved by a thousandth, so that the work stays linear.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.peak = self._most = 0
        self._own = {s._cdata: s for t in [*model.parameters(), *model.buffers()] for s in [t.untyped_storage()]}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}  # a reference keeps its key from being used again

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else (made,):
            if isinstance(t, Tensor):
                self._add(t.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._own or key in self._alive:
            return
        self._alive[key] = (StorageWeakRef(storage), size)
        self._most += size
        if self._most > 1.001 * self.peak:
            self.peak = max(self.peak, self.now)

    @property
    def now(self) -> int:
        self._alive = {k: (ref, size) for k, (ref, size) in self._alive.items() if not ref.expired()}
        self._most = sum(size for _, size in self._alive.values())
        return self._most


@contextmanager
def counting_saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Inside, what autograd saves for the backward pass: storage -> bytes, without the model's own tensors."""
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}
    kept: list[torch.UntypedStorage] = []  # alive, so that no two have the same handle

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own and storage._cdata not in found:
            found[storage._cdata] = storage.nbytes()
            kept.append(storage)
        return t.detach()  # what a node has made would hold the node, and nothing of the step would ever be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found


def labels_for(model: nn.Module, ids: Tensor) -> Tensor:
    """Labels of the right shape for the model's kind: each token's, or one class for each sequence."""
    return ids if hasattr(model, "lm_head") or model.get_output_embeddings() is not None else torch.zeros(len(ids), dtype=torch.int64)


def config_of(base: str | Path, task: str) -> Any:
    """The configuration of a base that a step can be planned for. LorakitError otherwise."""
    import transformers

    if task not in ("causal-lm", "sequence-classification"):
        raise LorakitError(f"plan: a step of the task `{task}` is not known{near(task, TASKS)}")
    try:
        config = transformers.AutoConfig.from_pretrained(where(base))
    except (OSError, ValueError) as e:
        raise LorakitError(f"could not read the configuration of {base}: {str(e).splitlines()[0]}") from e
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = 0  # a classifier of a batch asks for one; the cost does not depend on which
    return config


def step(model: nn.Module, batch: int, length: int) -> tuple[int, int, int]:
    """(bytes saved for the backward pass, bytes of the logits, most bytes alive beyond the model's) of one forward and backward pass."""
    ids = torch.ones(batch, length, dtype=torch.int64)
    labels = labels_for(model, ids)
    with counting_saved(model) as saved:
        model(input_ids=ids, labels=labels)
    with Live(model) as live:
        out = model(input_ids=ids, labels=labels)
        logits, loss = out.logits.untyped_storage().nbytes(), out.loss
        del out  # as a trainer does, so that the logits go when the loss no longer needs them
        loss.backward()
    return sum(saved.values()), logits, live.peak


def memory(base: str | Path, adapter: str | Any = "lora", *, task: str = "causal-lm", batch: int = 8, length: int = 512, dtype: str | None = None,
           optimizer: str = "adamw", gradient_checkpointing: bool = False, quantize: str | Any = None, **options: Any) -> Memory:
    """What one training step of an adapter takes, from the base's configuration alone. Options are those of `lorakit.adapt`.

    adapter: None for the base with everything training. quantize: how its linear layers are kept, as `lorakit.quantize` takes it. LorakitError for
    an unknown optimiser, task, scheme, or a batch below 1.
    """
    import transformers
    from torch._subclasses.fake_tensor import FakeTensorMode

    if optimizer not in STATES:
        raise LorakitError(f"plan: unknown optimiser `{optimizer}`{near(optimizer, STATES)}")
    if batch < 1 or length < 1:
        raise LorakitError(f"plan: batch and length must be at least 1, not {batch} and {length}")
    config = config_of(base, task)
    kind = dtype_of(dtype)
    kind = (config.dtype or torch.float32) if kind == "auto" else kind
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, TASKS[task]).from_config(config, dtype=kind).train()
        if quantize is not None:
            api.quantize(model, quantize)
        whole = _bytes(model)
        if adapter is not None:
            api.adapt(model, adapter, **options)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        train = [p for p in model.parameters() if p.requires_grad]
        gradients = sum(p.untyped_storage().nbytes() for p in train)
        saved, logits, alive = step(model, batch, length)
        model_bytes = _bytes(model)
    state = STATES[optimizer] * gradients
    peak = model_bytes + state + max(alive, gradients * (1 + SCRATCH[optimizer]))
    return Memory(sum(p.numel() for p in train), whole, model_bytes - whole, gradients, state, saved, logits, peak)


def _bytes(model: nn.Module) -> int:
    every = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    return sum(every.values())
