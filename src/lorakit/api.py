"""The verbs: adapt, activate, merge, save, load. Everything acts on the model it is given, in place unless it says otherwise."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import host
from lorakit.errors import LorakitError, near
from lorakit.formats import peft
from lorakit.formats.files import read_json, recover, sha256, writing
from lorakit.formats.receipt import (
    compare_bases,
    digest,
    fingerprint,
    modules_table,
    probe,
    probe_record,
    versions,
)
from lorakit.inits import INITS
from lorakit.method import Method
from lorakit.methods.lora import LoRA
from lorakit.methods.offset import Offset
from lorakit.recipes import compose
from lorakit.sites import adaptable
from lorakit.spec import Spec


def adapt(model: nn.Module, adapter: str | Spec | Method = "lora", *, name: str = "default", **options: Any) -> nn.Module:
    """Puts an adapter on the model, freezes the base, makes the adapter the active one; returns the same model.

    adapter: a recipe's name ("lora", "dora", …; `lorakit methods` lists them), a Spec, or a Method. Options are those of
    the ecosystem: r, lora_alpha, lora_dropout, target_modules, exclude_modules, layers_to_transform, rank_pattern,
    alpha_pattern, modules_to_save, use_dora, use_rslora, init, freeze, seed.

    >>> model = adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), "lora", r=2, target_modules="0")
    >>> [n for n, p in model.named_parameters() if p.requires_grad]
    ['0.lora_A.default', '0.lora_B.default']
    """
    spec = compose(adapter, **options)
    attach(model, name, spec, spec.plan(model))
    return model


def attach(model: nn.Module, name: str, spec: Spec, plan: Mapping[str, Method], empty: bool = False) -> None:
    """`adapt` for a plan already made: path -> method."""
    init = INITS[spec.init] if spec.init else None
    absorb = False
    if init and init.nonzero and not empty:
        absorb = spec.storage == "base"
        if spec.storage == "offset":
            plan = {p: m if m.replaces else m.over_core(Offset) for p, m in plan.items()}

    def start(core, p, origin, gen):
        if all(leaf in p for leaf in init.needs):
            init(core, p, origin, gen)

    state = host.attach(model, name, plan, spec, dropout=spec.dropout, freeze=spec.freeze, start=start if init else None,
                        absorb=absorb, seed=spec.seed, empty=empty)
    if not state.chained:
        state.active = {name: 1.0}


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
    keep, rows, state.active, state.rows = state.active, state.rows, {}, None
    try:
        yield model
    finally:
        state.active, state.rows = keep, rows


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Mixed batch, inside a `with` block: row n of every input goes through adapter names[n]; None is the base."""
    state = host.known(model, [n for n in names if n is not None])
    order = tuple(dict.fromkeys(n for n in names if n is not None))
    keep, state.rows = state.rows, (order, torch.tensor([-1 if n is None else order.index(n) for n in names]))
    try:
        yield model
    finally:
        state.rows = keep


def freeze(model: nn.Module, name: str) -> nn.Module:
    """The adapter stays in effect but does not train."""
    host.known(model, [name])
    for slot in host.slots(model, name).values():
        for t in slot.params(name).values():
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
    new = copy.deepcopy(model)
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


def trainable(model: nn.Module) -> tuple[int, int]:
    """(numbers that train, all numbers of the base and the adapters), tied and shared ones once."""
    every = list(model.parameters())
    return sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every)


# Files


def base_info(model: nn.Module) -> dict[str, Any]:
    """What a config and a receipt say of the base model."""
    config = getattr(model, "config", None)
    kinds = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
             "ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForTokenClassification": "TOKEN_CLS"}
    task = next((v for k, v in kinds.items() if type(model).__name__.endswith(k)), None)
    return {"name": getattr(config, "_name_or_path", None) or None, "revision": getattr(config, "_commit_hash", None), "task_type": task,
            "class": type(model).__name__}


def save(model: nn.Module, path: str | Path, name: str | None = None, *, form: str = "auto", lineage: Sequence[Mapping[str, Any]] = (),
         check: bool = True) -> Path:
    """Saves one adapter as a PEFT folder with a receipt; all of it appears, or nothing changes. Then reads it back and verifies.

    form: "auto" writes PEFT's format where PEFT has the method, a plain LoRA where the update is exactly one (an offset
    start), and our own otherwise; "native" never converts (checkpoints); "lora" converts or refuses.
    """
    state = host.state_of(model)
    name = _one(state, name)
    if state.merged is not None:
        raise LorakitError(f"adapters {sorted(state.merged)} are merged into the base; mend: lorakit.unmerge(model) before saving")
    path, spec = Path(path), state.specs[name]
    slots = host.slots(model, name)
    export = _Export(model, slots, name, form)
    base = base_info(model) | {"transposed": bool(slots) and all(s.site.transposed and not s.site.lookup for s in slots.values())}
    every = [n for n, m in model.named_modules() if adaptable(m)]
    config = peft.config_of(spec, export.methods, base, every)
    receipt = _receipt(model, name, spec, export, config, base, lineage)
    _no_empty(export.tensors, path)
    with writing(path) as out:
        from safetensors.torch import save_file

        save_file(export.tensors, str(out.path(peft.TENSORS)), metadata={"format": "pt"})
        out.json(peft.CONFIG, config)
        receipt["files"] = {n: sha256(path / f".lorakit-tmp-{n}") for n in (peft.TENSORS, peft.CONFIG)}
        out.json(peft.RECEIPT, receipt)
    if check:
        from lorakit.verify import verify_saved

        verify_saved(path, export.tensors)
    return path


def _one(state: host.State, name: str | None) -> str:
    if name is None:
        if len(state.specs) == 1:
            return next(iter(state.specs))
        if len(state.active) == 1:
            return next(iter(state.active))
        raise LorakitError(f"which adapter? there are {', '.join(state.specs)}")
    if name not in state.specs:
        raise LorakitError(f"the model has no adapter `{name}`{near(name, state.specs)}")
    return name


class _Export:
    """The adapter as it goes to disk: path -> method, file key -> tensor, and what was converted on the way."""

    def __init__(self, model: nn.Module, slots: Mapping[str, host.Slot], name: str, form: str):
        if form not in ("auto", "native", "lora"):
            raise LorakitError(f"form: unknown `{form}`{near(form, ('auto', 'native', 'lora'))}")
        self.methods, self.tensors, self.converted = {}, {}, []
        for path, slot in slots.items():
            method, p = _with_start(slot, name)
            if form == "lora" or (form == "auto" and method.to_peft() is None):
                method, p = self._lora(path, method, p, must=form == "lora")
            self.methods[path] = method
            site = slot.site
            for leaf, t in p.items():
                shared = method.leaves[leaf].shared
                key = method.key(leaf, site.lookup).removeprefix("modules_to_save.")
                full = f"base_model.{key}" if shared else f"{peft.PREFIX}{path}.{key}"
                if shared:
                    t = slot.module._modules[slot.attr(name, leaf)]._parameters[name]
                self.tensors[full] = (t if shared else site.pack(t, method.leaves[leaf].axes)).detach().to("cpu").contiguous().clone()

    def _lora(self, path: str, method: Method, p: Mapping[str, Tensor], must: bool) -> tuple[Method, Mapping[str, Tensor]]:
        two = None if method.replaces else method.two(p)
        if two is None:
            if must and not method.replaces:
                raise LorakitError(f"{path}: {method.name} is not exactly a plain LoRA; mend: form='native', or merge it")
            return method, p
        r = two[1].shape[0]
        self.converted.append(path)
        return LoRA(r, float(r)), {"A": two[1], "B": two[0]}


def _with_start(slot: host.Slot, name: str) -> tuple[Method, dict[str, Tensor]]:
    """An adapter whose start went into the base is written as an offset one, which the untouched base can carry."""
    method, p = slot.methods[name], slot.params(name)
    if slot.absorbed and slot.absorbed.adapter == name:
        return method.over_core(Offset), p | {f"{k}0": v for k, v in slot.absorbed.p0.items()}
    return method, p


def _no_empty(tensors: Mapping[str, Tensor], path: Path) -> None:
    for k, t in tensors.items():
        if t.numel() == 0:
            raise LorakitError(f"{path}: the tensor {k} is empty (a sharded parameter that was not gathered?); nothing was written")
        if t.device.type == "meta":
            raise LorakitError(f"{path}: the tensor {k} has no values (meta device); nothing was written")


def _receipt(model, name, spec, export, config, base, lineage) -> dict[str, Any]:
    state = host.state_of(model)
    prints = fingerprint(model)
    keep, rows_, chained = state.active, state.rows, state.chained
    try:
        state.rows, state.active, state.chained = None, {}, False
        without = probe(model)
        state.active = {name: 1.0}
        with_it = probe(model)
    finally:
        state.active, state.rows, state.chained = keep, rows_, chained
    out = {"format": peft.FORMAT, "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "adapter": name,
           "spec": spec.to_dict(), "peft_type": config["peft_type"], "converted_to_lora": export.converted,
           "base": base | {"digest": digest(prints), "tensors": prints}, "modules": modules_table(model, name),
           "keys": {k: list(t.shape) for k, t in export.tensors.items()}, "versions": versions(), "lineage": list(lineage)}
    if with_it is not None:
        out["probe"] = probe_record(with_it, without)
    return out


def load(model: nn.Module, path: str | Path, name: str = "default", *, trainable: bool = False, check_base: bool = True,
         probe: bool = False) -> nn.Module:
    """Puts a saved adapter on the model and makes it the active one.

    Every tensor must find its place and every place its tensor; with a receipt the base's fingerprint must match
    (`check_base`), and with `probe` the logits must be those of the day it was saved. Raises LorakitError otherwise and
    leaves the model as it was. trainable: the leaves train again; the default is inference.
    """
    from lorakit.verify import check_probe

    folder = Folder(path)
    if check_base and folder.receipt:
        _same_base(model, folder)
    plan = folder.plan(model)
    spec = folder.spec
    attach(model, name, spec, plan, empty=True)
    try:
        _fill(model, name, folder)
        if probe and folder.receipt:
            check_probe(model, name, folder)
    except BaseException:
        host.delete(model, name)
        raise
    return model if trainable else freeze(model, name)


class Folder:
    """A saved adapter, read and checked: config, tensors, receipt (None for one that another library wrote)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            there = [p.name for p in self.path.parent.iterdir()] if self.path.parent.is_dir() else []
            raise LorakitError(f"there is no adapter folder {self.path}{near(self.path.name, there) if there else ''}")
        recover(self.path)
        self.config = read_json(self.path / peft.CONFIG)
        self.tensors = peft.read_tensors(self.path / peft.TENSORS)
        receipt = self.path / peft.RECEIPT
        self.receipt = read_json(receipt) if receipt.is_file() else None
        self.methods = peft.methods_of(self.config, self.tensors, self.path / peft.CONFIG)

    @property
    def spec(self) -> Spec:
        method = next((m for m in self.methods.values() if not m.replaces), None) or next(iter(self.methods.values()))
        extra = Spec.from_dict(self.receipt["spec"]) if self.receipt else None
        kept = {} if extra is None else {"freeze": tuple(f for f in extra.freeze if f in method.leaves), "recipe": extra.recipe, "seed": extra.seed}
        return Spec(method, tuple(p for p, m in self.methods.items() if not m.replaces), dropout=self.config.get("lora_dropout") or 0.0, **kept)

    def plan(self, model: nn.Module) -> dict[str, Method]:
        """Path on this model -> method. LorakitError where the model has no such module."""
        if not self.methods:
            keys = ", ".join(list(self.tensors)[:3])
            raise LorakitError(f"{self.path}: no tensor has a key of this method; the file holds {keys or 'nothing'}")
        modules = dict(model.named_modules())
        for p in self.methods:
            if p not in modules:
                raise LorakitError(f"{self.path}: the adapter has `{p}`, which this {type(model).__name__} has not{near(p, modules)}")
        return {p: m for n in modules if (p := n) in self.methods for m in [self.methods[p]]}


def _same_base(model: nn.Module, folder: Folder) -> None:
    was = folder.receipt["base"]["tensors"]
    replaced = tuple(f"{p}." for p, m in folder.methods.items() if m.replaces)
    now = {n: p for n, p in fingerprint(model).items() if not n.startswith(replaced or ("\0",))}
    if diff := compare_bases(was, now):
        more = f" (and {len(diff) - 3} more)" if len(diff) > 3 else ""
        raise LorakitError(f"{folder.path} was trained on another base ({folder.receipt['base'].get('name')}): {'; '.join(diff[:3])}{more}. "
                           "Mend: load that base, or pass check_base=False if you know better")


@torch.no_grad()
def _fill(model: nn.Module, name: str, folder: Folder) -> None:
    places = peft.expected(host.slots(model, name), name)
    tensors, where = dict(folder.tensors), folder.path / peft.TENSORS
    for k in [k for k in tensors if k.endswith(".base_layer.weight")]:  # PEFT keeps a copy of an adapted embedding's table
        del tensors[k]
    missing = [k for k in places if k not in tensors]
    unused = [k for k in tensors if k not in places]
    if missing:
        raise LorakitError(f"{where}: the tensor `{missing[0]}` is missing{_and(missing)}{near(missing[0], unused, 1) if unused else ''}")
    if unused:
        raise LorakitError(f"{where}: the tensor `{unused[0]}` has no place in this model{_and(unused)}{near(unused[0], places, 1)}")
    for k, (slot, leaf) in places.items():
        spec = slot.methods[name].leaves[leaf]
        place = slot.module._modules[slot.attr(name, leaf)]._parameters[name]
        want = slot.site.pack(place, spec.axes) if not spec.shared else place
        if tensors[k].shape != want.shape:
            raise LorakitError(f"{where}: `{k}` has shape {list(tensors[k].shape)}, this model and configuration need {list(want.shape)}")
        value = tensors[k] if spec.shared else slot.site.unpack(tensors[k], spec.axes)
        if not torch.isfinite(value).all():
            raise LorakitError(f"{where}: `{k}` holds NaN or infinity")
        place.copy_(value)


def _and(keys: Sequence[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
