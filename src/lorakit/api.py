"""The verbs: adapt, activate, merge, save, load. Everything acts on the model it is given, in place unless it says otherwise."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit import host
from lorakit.errors import LorakitError, near
from lorakit.formats import folder
from lorakit.formats.files import new_folder
from lorakit.merges.shrink import shrink as shrink_
from lorakit.method import Method
from lorakit.models import load_base, task_of
from lorakit.proof import check_probe, check_saved, same_function
from lorakit.recipes import compose
from lorakit.spec import Spec, attach
from lorakit.stores.shards import GROWS, WRITES, scattered, sharded


def adapt(model: nn.Module, adapter: str | Spec | Method = "lora", *, name: str = "default", data: Iterable | None = None,
          **options: Any) -> nn.Module:
    """Puts an adapter on the model, freezes the base, makes the adapter the active one; returns the same model.

    adapter: a recipe's name ("lora", "dora", …; `lorakit methods` lists them), a Spec, or a Method. Options are those of
    the ecosystem: r, lora_alpha, lora_dropout, target_modules, exclude_modules, layers_to_transform, rank_pattern,
    alpha_pattern, modules_to_save, use_dora, use_rslora, init, freeze, seed. data: batches (dicts of the model's inputs) for a
    start that looks at some (init: corda, eva, lora-ga).

    >>> model = adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), "lora", r=2, target_modules="0")
    >>> [n for n, p in model.named_parameters() if p.requires_grad]
    ['0.lora_A.default', '0.lora_B.default']
    """
    spec, base = compose(adapter, **options), host.bare(model, "adapt")
    attach(base, name, spec, spec.plan(base), data=data)
    return model


def adapters(model: nn.Module) -> dict[str, Spec]:
    """Name -> spec of the adapters on the model."""
    return dict(host.state_of(model).specs)


def active(model: nn.Module) -> dict[str, float]:
    """Name -> weight of the adapters in effect."""
    return dict(host.state_of(model).active)


def activate(model: nn.Module, *names: str, weights: Sequence[float] | None = None, chain: bool = False) -> nn.Module:
    """Puts exactly these adapters into effect, W + sum of w_n (W_n - W). One assignment, whatever the model's size.

    chain: each adapter acts on what the one before it made (W -> W_1 -> W_2) instead of all on one base.
    """
    state = host.known(model, names)
    if state.merged is not None:
        raise LorakitError(f"adapters {sorted(state.merged)} are merged into the base; mend: lorakit.unmerge(model) first")
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(weights) != len(names):
        raise LorakitError(f"{len(names)} adapters but {len(weights)} weights")
    state.active, state.chained, state.rows = dict(zip(names, map(float, weights), strict=True)), chain, None
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base alone, inside a `with` block."""
    state = host.state_of(model)
    if state.merged is not None:
        raise LorakitError(f"adapters {sorted(state.merged)} are merged into the base; mend: lorakit.unmerge(model) first")
    keep, rows, state.active, state.rows = state.active, state.rows, {}, None
    try:
        yield model
    finally:
        state.active, state.rows = keep, rows


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Mixed batch, inside a `with` block: row n of every input goes through adapter names[n]; None is the base.

    Works in training and inference, with different ranks and methods in one batch. What a model makes of one row follows it:
    tokens folded into the batch, and under `generate` its beams and returned sequences.
    """
    state = host.known(model, [n for n in names if n is not None])
    if state.merged is not None:
        raise LorakitError(f"adapters {sorted(state.merged)} are merged into the base; mend: lorakit.unmerge(model) first")
    order = tuple(dict.fromkeys(n for n in names if n is not None))
    keep, state.rows = state.rows, (order, torch.tensor([-1 if n is None else order.index(n) for n in names]))
    free, generate = [False], vars(model).get("generate")

    def check(module, args, kwargs):
        x = next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)), None)
        if x is not None and not free[0] and x.dim() and len(x) != len(names):
            raise LorakitError(f"a mixed batch of {len(names)} rows got an input whose first dimension is {len(x)}")

    def generating(*args, **kwargs):  # beams and returned sequences make several entries of one row
        free[0] = True
        try:
            return type(model).generate(model, *args, **kwargs) if generate is None else generate(*args, **kwargs)
        finally:
            free[0] = False

    hook = model.register_forward_pre_hook(check, with_kwargs=True)
    if hasattr(model, "generate"):
        model.generate = generating
    try:
        yield model
    finally:
        state.rows = keep
        hook.remove()
        if generate is not None:
            model.generate = generate
        else:
            vars(model).pop("generate", None)


@contextmanager
def given(model: nn.Module, **values: torch.Tensor) -> Iterator[nn.Module]:
    """Inside a `with` block: what methods ask of a batch beside its input, one value for each row: task_ids (b,) for Poly."""
    state = host.state_of(model)
    known = {name for slot in host.slots(model).values() for m in slot.methods.values() for name in m.asks}
    for name in values:
        if name not in known:
            raise LorakitError(f"no adapter on this model asks for `{name}`{near(name, known)}")
    keep, state.given = state.given, {k: torch.as_tensor(v) for k, v in values.items()}
    try:
        yield model
    finally:
        state.given = keep


def freeze(model: nn.Module, name: str) -> nn.Module:
    """The adapter stays in effect but does not train."""
    host.known(model, [name])
    every = [t for slot in host.slots(model, name).values() for t in slot.parameters(name).values()]
    if any(scattered(t) for t in every):
        raise LorakitError(f"adapter `{name}` is spread over processes (FSDP), which keep training what trained then; mend: lorakit.freeze before fully_shard")
    for t in every:
        t.requires_grad_(False)
    return model


def delete(model: nn.Module, name: str) -> nn.Module:
    """Takes one adapter off the model."""
    host.delete(model, name)
    return model


detach = host.detach


def merge(model: nn.Module) -> nn.Module:
    """Writes the active adapters into the base weights, in place; `unmerge` undoes it to the bit."""
    host.merge(model)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Puts the untouched base weights back."""
    host.unmerge(model)
    return model


def merged(model: nn.Module) -> nn.Module:
    """A new, plain model with the active adapters merged in; the given one is not touched."""
    base = host.bare(model)
    if sharded(base):
        raise LorakitError(WRITES)
    new = copy.deepcopy(base)
    host.merge(new)
    host.unload(new)
    untie(new)
    return new


def untie(model: nn.Module) -> bool:
    """Tells the configuration where merging has parted an embedding and a head that were tied; returns whether it did."""
    config = getattr(model, "config", None)
    get = getattr(model, "get_output_embeddings", None)
    head, body = (get(), model.get_input_embeddings()) if get is not None else (None, None)
    parted = head is not None and getattr(config, "tie_word_embeddings", False) and head.weight is not body.weight
    if parted:
        config.tie_word_embeddings = False
    return parted


def shrink(model: nn.Module, name: str, rank: int, new_name: str) -> dict[str, float]:
    """Puts a copy of a trained adapter with a lower rank beside it, the best there is; returns the relative error of each target, and "overall"."""
    return shrink_(host.bare(model), name, rank, new_name)


def trainable(model: nn.Module) -> tuple[int, int]:
    """(numbers that train, all numbers of the base and the adapters), tied and shared ones once."""
    every = list(model.parameters())
    return sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every)


# Files

def save(model: nn.Module, path: str | Path, name: str | None = None, *, form: str = "auto", rank: int | None = None,
         lineage: Sequence[dict] = ()) -> Path:
    """Saves one adapter as a PEFT folder with a receipt, reads it back and verifies it; all of it appears, or nothing changes.

    form: "auto" writes PEFT's format where PEFT has the method, a plain LoRA where the update is exactly one (an offset
    start), and our own otherwise; "native" never converts; "lora" converts or refuses: exactly where the update is a product
    of thin factors, else to the nearest LoRA of this `rank`, whose relative error stands in the receipt.
    """
    model = host.bare(model)
    path = folder.save(model, path, name, form=form, rank=rank, lineage=lineage)
    check_saved(path, model)
    return path


def load(model: nn.Module, path: str | Path, name: str = "default", *, trainable: bool = False, check_base: bool = True,
         probe: bool = False) -> nn.Module:
    """Puts a saved adapter on the model and makes it the active one; returns the same model.

    Every tensor must find its place and every place its tensor; with a receipt the base's fingerprint must match
    (`check_base`), and with `probe` the logits must be those of the day it was saved. Raises LorakitError otherwise and
    leaves the model as it was. trainable: the leaves train again; the default is inference.
    """
    base = host.bare(model, "load" if trainable else "")
    if trainable and sharded(base):
        raise LorakitError(GROWS.format("load"))
    with host.tentative(base, name):
        read = folder.load(base, path, name, check_base)
        if probe and read.receipt:
            check_probe(base, name, read)
    return model if trainable else freeze(model, name)


def save_merged(model: nn.Module, path: str | Path, tokenizer: Any = None) -> Path:
    """Merges the active adapters into a copy of the model, saves it as a transformers folder, reads it back and checks it.

    The folder appears whole under its name or not at all. Raises LorakitError if what is on disk is not base + adapter.
    """
    path, new = Path(path), merged(model)
    if not hasattr(new, "save_pretrained"):
        raise LorakitError(f"{type(new).__name__} has no save_pretrained; mend: lorakit.merged(model) and save its state dict yourself")
    with new_folder(path) as tmp:
        new.save_pretrained(tmp)
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp)
        again = load_base(tmp, task_of(type(new).__name__), dtype=next(new.parameters()).dtype)
        same_function(new, again, f"the merged model written to {path}")
    return path


