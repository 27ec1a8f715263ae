"""The verbs: adapt, activate, merge, save, load. Everything acts on the model it is given, in place unless it says otherwise."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit import host
from lorakit.errors import LorakitError, near
from lorakit.formats import folder
from lorakit.formats.base import opened
from lorakit.formats.convert import Conversion
from lorakit.formats.convert import convert as convert_
from lorakit.formats.files import new_folder, read_json
from lorakit.formats.receipt import compare_bases, fingerprint
from lorakit.formats.receipt import probe as logits_of
from lorakit.merges.checkpoints import MixedCheckpoint, whole
from lorakit.merges.checkpoints import mix_checkpoints as mix_files
from lorakit.merges.diff import Diff
from lorakit.merges.diff import diff as diff_
from lorakit.merges.mix import Mixed, Stats, mix_on
from lorakit.merges.mix import mix as mix_
from lorakit.merges.routes import route as by_route
from lorakit.merges.shrink import shrink as shrink_
from lorakit.merges.streamed import merge_checkpoint as merge_files
from lorakit.method import Method
from lorakit.models import load_base, load_tokenizer, skeleton, task_of, where
from lorakit.proof import check_probe, check_saved, load_base_for, same_function
from lorakit.quantized import note, packed, quantize
from lorakit.quantized.bits import allot
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
    tokens folded into the batch, and under `generate` its beams and returned sequences. Rows with fewer learnt tokens, or none, are padded
    with masked ones, so that prompts, prefixes and plain adapters share a batch.
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


def merge(model: nn.Module, route: str = "dequantized", **options: Any) -> nn.Module:
    """Writes the active adapters into the base weights, in place; `unmerge` undoes it to the bit (but for route residual).

    route: what becomes of a quantised base (`lorakit.merges.routes`): dequantized, requantize (least, force), exact, residual (error).
    """
    by_route(route)(host.bare(model), **options)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Puts the untouched base weights back."""
    host.unmerge(model)
    return model


def merged(model: nn.Module, route: str = "dequantized", **options: Any) -> nn.Module:
    """A new model without adapters, the active ones merged in (route residual: with one more, `residual`); the given one is not touched."""
    base = host.bare(model)
    if sharded(base):
        raise LorakitError(WRITES)
    new = copy.deepcopy(base)
    by_route(route)(new, **options)
    if host.find_state(new) and host.state_of(new).merged is not None:
        host.unload(new)
    untie(new)
    note(new)
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


def mix(adapters: Sequence[str | Path], output: str | Path, rule: str = "linear", *, weights: Sequence[float] | None = None, rank: int | None = None,
        base: str | Path | nn.Module | None = None, model: nn.Module | None = None, stats: Sequence[Stats] | None = None, seed: int = 0,
        check_base: bool = True, niter: int = 0, **options: Any) -> Mixed:
    """Makes one plain LoRA of several adapters: ΔW = rule(ΔW_1 … ΔW_n), target by target (`lorakit.merges.ROWS` has the rules).

    adapters: saved adapters, and `output` the folder to write; or, with `model`, names of adapters on it, and `output` the new one's name
    (beside them, not active). Ranks, scales, targets and methods may differ; a target that an adapter lacks is a zero update of it.
    weights: one for each adapter, negative ones take away; default 1. rank: of the result; by default the sum of the ranks
    where the rule stays in the factors (exact), else the largest of the sources', and the error is said. niter: above 0, a matrix is brought
    to its rank by that many rounds of subspace iteration (2 are nearly exact, and many times faster on large layers). base: the base model, or where
    it is: needed only where an update depends on the weight, and then the result is verified on it. stats: for rules that need them
    (`lorakit.merges.stats`), of each adapter. options: the rule's own. seed: of what a rule draws. Raises LorakitError and writes nothing,
    or all of it, read back.
    """
    if isinstance(adapters, str | Path) or not adapters:
        raise LorakitError("mix: there is no adapter to mix" if not adapters else "mix: give a list of adapters")
    if model is not None:
        return mix_on(host.bare(model), [str(a) for a in adapters], str(output), rule, weights, rank, seed, stats, options, niter)
    if base is not None and not isinstance(base, nn.Module):
        base = load_base_for(folder.Folder(adapters[0]), base)
    return mix_(adapters, output, rule, weights, rank, None if base is None else host.bare(base), seed, stats, check_base, options, niter)


def mix_checkpoints(sources: Sequence[str | Path], output: str | Path, rule: str = "linear", *, weights: Sequence[float] | None = None,
                    base: str | Path | None = None, stats: Sequence[Stats] | None = None, seed: int = 0, check_base: bool = True,
                    **options: Any) -> MixedCheckpoint:
    """Writes a whole checkpoint, W = W_0 + rule(W_1 - W_0, …), tensor by tensor, from the files alone; the rules are those of `mix`, no rank is cut.

    sources: folders of whole models (safetensors, any shards and floating-point dtypes), of adapters on the base, or of both. base: folder of W_0; of
    adapters, by default the one that the first names. Without one, whole models are mixed as they are, W = rule(W_1, …, W_n), by the rules of which equal
    weights come out as they went in (linear with weights that sum to 1, their default then; slerp, fisher, regmean). What is written is the base's folder,
    or the first source's, with other numbers. Memory: a float32 tensor for each source and a few more, of the largest there is. LorakitError where names
    or shapes differ, a number is NaN, a checkpoint is quantised, or a rule or an adapter cannot do so; the output is whole or absent.
    """
    if isinstance(sources, str | Path) or not sources:
        raise LorakitError("mix: there is nothing to mix" if not sources else "mix: give a list of folders")
    found = [Path(where(s)) if str(s) == "embedded" or whole(s) else Path(s) for s in sources]
    first = next((folder.Folder(s) for s in found if not whole(s)), None)
    told = base if base is not None or first is None else first.base
    if told is None:
        return mix_files(found, output, rule, weights, None, _maybe_skeleton(found[0]), seed, stats, check_base, options)
    at = Path(where(told))
    tree = skeleton(at, _task(first)) if first else _maybe_skeleton(at)
    return mix_files(found, output, rule, weights, at, tree, seed, stats, check_base, options)


def _maybe_skeleton(folder: Path) -> nn.Module | None:
    """The model of a checkpoint on the meta device, where transformers knows it: which side of a weight is the input, for rules that ask."""
    names = read_json(folder / "config.json").get("architectures") or [""] if (folder / "config.json").is_file() else [""]
    with suppress(LorakitError, ValueError):
        return skeleton(folder, task_of(names[0]))
    return None


def diff(a: str | Path, b: str | Path, base: str | Path | nn.Module | None = None) -> Diff:
    """What differs between two saved adapters: configurations, targets, ranks, and of each target the cosine between the updates, the ratio of
    their norms, and their distance, from the factors. base: needed only where an update depends on the weight.
    """
    if base is not None and not isinstance(base, nn.Module):
        base = load_base_for(folder.Folder(a), base)
    return diff_(a, b, None if base is None else host.bare(base))


def trainable(model: nn.Module) -> tuple[int, int]:
    """(numbers that train, all numbers of the base and the adapters), tied and shared ones once."""
    every, kept = list(model.parameters()), sum(math.prod(layer.shape) for layer in packed(model).values())
    return sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every) + kept


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
    if repacked(model) and not host.state_of(model).own_base:
        warnings.warn(f"{path}: its start made the quantised base anew, and this adapter fits no other; mend: lorakit.save_base(model, folder)", stacklevel=2)
    return path


def repacked(model: nn.Module) -> bool:
    """Whether an adapter's start made the quantised base anew (init: loftq, lq-lora, or another with storage: base)."""
    return any(s.repacked for s in host.slots(model).values())


def save_base(model: nn.Module, path: str | Path, tokenizer: Any = None) -> Path:
    """Saves the base under the adapters as it is now, reads it back, and lets the adapters name it: what LoftQ and LQ-LoRA made of it is kept.

    The folder appears whole or not at all. Raises LorakitError if what is on disk is another base, or adapters are merged.
    """
    path, base = Path(path), host.bare(model)
    prints = fingerprint(base)
    inside = tuple(f"{n}." for n, m in base.named_modules() if isinstance(m, host.Leaves | host.Holder))
    with new_folder(path) as tmp:
        base.save_pretrained(tmp, state_dict={k: t for k, t in base.state_dict().items() if not k.startswith(inside)} if inside else None)
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp)
        again = load_base(tmp, task_of(type(base).__name__), dtype=next(base.parameters()).dtype)
        if diff := compare_bases(prints, fingerprint(again)):
            raise LorakitError(f"the base read back from {path} is another: {diff[0]}")
    base.config._name_or_path = base.name_or_path = str(path)
    if state := host.find_state(base):
        state.own_base = str(path)
    return path


def load(model: nn.Module, path: str | Path, name: str = "default", *, trainable: bool = False, check_base: bool = True,
         probe: bool = False) -> nn.Module:
    """Puts a saved adapter on the model and makes it the active one; returns the same model.

    path: an adapter folder, or an adapter in another known format (kohya, GGUF, MLX), which is told by what it holds. Every tensor
    must find its place and every place its tensor; with a receipt the base's fingerprint must match
    (`check_base`), and with `probe` the logits must be those of the day it was saved. Raises LorakitError otherwise and
    leaves the model as it was. trainable: the leaves train again; the default is inference.
    """
    base = host.bare(model, "load" if trainable else "")
    if trainable and sharded(base):
        raise LorakitError(GROWS.format("load"))
    with host.tentative(base, name):
        read = folder.load(base, opened(path, base), name, check_base)
        for said in read.notes:
            warnings.warn(f"{path}: {said}", stacklevel=2)
        if probe and read.receipt:
            check_probe(base, name, read)
    return model if trainable else freeze(model, name)


def save_merged(model: nn.Module, path: str | Path, tokenizer: Any = None, route: str = "dequantized", **options: Any) -> Path:
    """Merges the active adapters into a copy of the model, saves it as a transformers folder, reads it back and checks it.

    The folder appears whole under its name or not at all. Raises LorakitError if what is on disk is not base + adapter. route: as for `merge`.
    """
    path, new = Path(path), merged(model, route, **options)
    if host.find_state(new):
        raise LorakitError("route residual leaves an adapter beside the base, which one folder does not hold; mend: lorakit.merge(model, 'residual'), then "
                           "save the base (model.save_pretrained) and the adapter (lorakit.save)")
    if not hasattr(new, "save_pretrained"):
        raise LorakitError(f"{type(new).__name__} has no save_pretrained; mend: lorakit.merged(model) and save its state dict yourself")
    with new_folder(path) as tmp:
        new.save_pretrained(tmp)
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp)
        again = load_base(tmp, task_of(type(new).__name__), dtype=next(new.parameters()).dtype)
        same_function(new, again, f"the merged model written to {path}")
    return path


def _task(read: folder.Folder) -> str:
    info = (read.receipt or {}).get("base", {})
    return task_of(info["class"]) if "class" in info else "causal-lm"


def merge_checkpoint(base: str | Path, adapter: str | Path, output: str | Path) -> list[str]:
    """Base folder + adapter folder -> merged folder, one weight in memory at a time, without loading the model; returns the weights that changed.

    Nothing is verified but shapes and finite numbers: `lorakit.verify(adapter, base, merged=output)` does the rest. The output is whole or absent.
    """
    return merge_files(where(base), adapter, output, skeleton(base, _task(folder.Folder(adapter))))


@dataclass(frozen=True)
class Quantized:
    """What became of a model: scheme -> layers, bits a quantised weight, how many of these, bytes before and after, relative errors."""

    layers: Mapping[str, int]
    bits: float
    numbers: int
    before: int
    after: int
    error: float
    logits: float | None


@torch.no_grad()
def save_quantized(base: str | Path, output: str | Path, scheme: str | Mapping[str, Any] = "nf4", *, bits: float | None = None, dtype: str = "auto",
                   task: str = "causal-lm") -> Quantized:
    """Loads a base, quantises it, saves it with its tokenizer, reads it back and compares. The folder appears whole or not at all."""
    model = load_base(base, task, dtype=dtype)
    before, plain = _bytes(model), logits_of(model)
    quantize(model, scheme if bits is None else allot(model, bits), keep=True)
    layers = packed(model)
    gap = sum(float((m.site.store.read(torch.float32) - m.original.float()).double().square().sum()) for m in layers.values())
    size = sum(float(m.original.double().square().sum()) for m in layers.values())
    numbers = sum(m.shape[0] * m.shape[1] for m in layers.values())
    kept = sum(m.scheme.bytes(*m.shape) for m in layers.values())
    now = logits_of(model)
    with new_folder(Path(output)) as tmp:
        model.save_pretrained(tmp)
        with suppress(LorakitError):
            load_tokenizer(base).save_pretrained(tmp)
        same_function(model, load_base(tmp, task, dtype=dtype), f"the quantised model written to {output}")
    moved = None if plain is None else float((now - plain).norm() / plain.norm())
    return Quantized(Counter(m.scheme.name for m in layers.values()), 8 * kept / numbers, numbers, before, _bytes(model), (gap / size) ** 0.5, moved)


def _bytes(model: torch.nn.Module) -> int:
    return sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def convert(src: str | Path, dst: str | Path, to: str, base: str | Path | nn.Module | None = None, *, rank: int | None = None, check_base: bool = True,
            **options: Any) -> Conversion:
    """Writes a saved adapter, in whatever known format, to `dst` in another: peft, kohya, gguf, mlx, compeft, or vllm (a PEFT folder that vLLM takes).

    base: the base model, or where to load it from; where one is needed (kohya and GGUF are read beside it, GGUF is written beside it, methods
    are turned on it) and none is given, the one that the source names is taken. Where there is one, logits are compared, too. rank: turns every
    target into a plain LoRA of at most this rank, the nearest (its error is said); otherwise a method that the format cannot hold is turned where
    that is exact, or refused. options: prefix (kohya: lora_unet, lora_te, …); density and scale (compeft, which rounds, and says how far). What is
    written is read again and compared before it appears under its name; it is there whole, or not at all. Raises LorakitError.
    """
    def at_hand(needed: bool) -> nn.Module | None:
        if isinstance(base, nn.Module):
            return host.bare(base)
        if folder.Folder.there(Path(src)):
            return load_base_for(folder.Folder(src), base) if needed or base is not None else None
        return None if base is None else load_base(base)

    return convert_(src, dst, to, at_hand, rank=rank, check_base=check_base, **options)
