"""One saved adapter as a folder: written whole with its receipt, read back, checked, put on a model."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit import host
from lorakit.errors import LorakitError, near
from lorakit.formats import peft
from lorakit.formats.files import read_json, reading, sha256, writing
from lorakit.formats.receipt import compare_bases, digest, fingerprint, modules_table, probe, probe_record, versions
from lorakit.kernels.svd import lower_rank, thin_svd
from lorakit.maps import Base, each
from lorakit.method import Around, Method, Wrapper
from lorakit.methods.lora import LoRA
from lorakit.methods.offset import Offset
from lorakit.quantized import described
from lorakit.sites import place
from lorakit.spec import Spec, attach
from lorakit.stores.shards import cut, plain_class, sharded, writer

COPY = ".base_layer.weight"  # under this key PEFT keeps a copy of an adapted embedding's table


def base_info(model: nn.Module) -> dict[str, Any]:
    """What a config and a receipt say of the base model."""
    config = getattr(model, "config", None)
    kinds = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
             "ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForTokenClassification": "TOKEN_CLS"}
    cls = plain_class(model).__name__
    task = next((v for k, v in kinds.items() if cls.endswith(k)), None)
    return {"name": getattr(config, "_name_or_path", None) or None, "revision": getattr(config, "_commit_hash", None), "task_type": task,
            "class": cls}


def save(model: nn.Module, path: str | Path, name: str | None = None, *, form: str = "auto", rank: int | None = None, lineage: Sequence[Mapping[str, Any]] = (),
         config: Mapping[str, Any] | None = None) -> Path:
    """Saves one adapter as a PEFT folder with a receipt; all of it appears, or nothing changes. Then reads it back and compares.

    form: "auto" writes PEFT's format where PEFT has the method, a plain LoRA where the update is exactly one (an offset
    start), and our own otherwise; "native" never converts (checkpoints); "lora" converts, exactly where that can be, else to
    the best LoRA of this `rank` (its error is in the receipt), or refuses. config: keys of
    adapter_config.json that are known better (task_type, revision, …). Of a model that FSDP2 spreads over processes all
    of them call it: they gather together, the first one writes, and an error is raised in all.
    """
    sharded(model)
    state = host.state_of(model)
    name = _one(state, name)
    if state.merged is not None:
        raise LorakitError(f"adapters {sorted(state.merged)} are merged into the base; mend: lorakit.unmerge(model) before saving")
    path, spec = Path(path), state.specs[name]
    slots = host.slots(model, name)
    export = Export(model, name, form, rank)
    called = [s for s in slots.values() if not s.raw]
    base = base_info(model) | {"transposed": bool(called) and all(s.site.transposed and not s.site.lookup for s in called)}
    if not any(m.replaces for m in export.methods.values()) and str(base["task_type"]).endswith("_CLS"):
        base["task_type"] = None  # PEFT would look for a head in the file
    config = peft.config_of(spec, model, export.methods, base, export.own) | dict(config or {})
    _no_empty(export.tensors, path)
    receipt = _receipt(model, name, spec, export, config, base, lineage)
    with writer(model) as mine:
        if mine:
            _write(path, export.tensors, config, receipt)
    return path


def _write(path: Path, tensors: dict[str, Tensor], config: dict[str, Any], receipt: dict[str, Any]) -> None:
    with writing(path) as out:
        save_file(peft.written(config, tensors), str(out.path(peft.TENSORS)), metadata={"format": "pt"})
        out.json(peft.CONFIG, config)
        receipt["files"] = {n: sha256(path / f".lorakit-tmp-{n}") for n in (peft.TENSORS, peft.CONFIG)}
        out.json(peft.RECEIPT, receipt)
    _read_back(path, tensors)


def _read_back(path: Path, tensors: Mapping[str, Tensor]) -> None:
    folder = Folder(path)
    if changed := folder.changed:
        raise LorakitError(f"{path}: {changed} read back from disk is not what was written")
    for k, t in tensors.items():
        if k not in folder.tensors or not torch.equal(folder.tensors[k], t):
            raise LorakitError(f"{path}: the tensor `{k}` read back from disk is not what was written")


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


class Export:
    """The adapter as it goes to disk: path -> method, file key -> tensor, whether in our own layout, and what was converted on the way."""

    def __init__(self, model: nn.Module, name: str, form: str = "native", rank: int | None = None, otherwise: str = "form='native'"):
        slots, self.otherwise = host.slots(model, name), otherwise  # what else there is to do where a conversion cannot be
        if form not in ("auto", "native", "lora"):
            raise LorakitError(f"form: unknown `{form}`{near(form, ('auto', 'native', 'lora'))}")
        if rank is not None and form != "lora":
            raise LorakitError(f"rank is for form='lora', not for form={form!r}")
        self.methods, self.tensors, self.converted, self.rank = {}, {}, [], rank
        self.errors: dict[str, Sequence[float]] = {}  # target -> norms of what was left out and of the whole update, where the form is not exact
        params: dict[str, Mapping[str, Tensor]] = {}
        for path, slot in slots.items():
            if name in slot.tied:
                continue
            method, p = _with_start(slot, name)
            if slot.absorbed and slot.absorbed.adapter == name and slot.absorbed.written:
                self.converted.append(path)
            if form != "native":
                was, (method, p) = method, method.for_files(p)
                self.converted += [path] * (form == "auto" and was.plain_in_files and type(method) is LoRA)
            if form == "lora" or (form == "auto" and method.plain_in_files):
                method, p = self._lora(slot, method, p, must=form == "lora")
            self.methods[path], params[path] = method, p
        turned = {type(slots[p].methods[name]) for p, m in self.methods.items() if type(m) is LoRA} - {LoRA} if form == "auto" else set()
        for path in [p for p, m in self.methods.items() if type(m) in turned]:  # where some of a kind are a LoRA now, all are, so that one file holds them
            self.methods[path], params[path] = self._lora(slots[path], self.methods[path], params[path], must=False)
        files = peft.file_paths(dict(model.named_modules()), self.methods)
        fits = files is not None and peft.carries_ties(slots, name) and all(peft.common(slots[p].site, m) for p, m in self.methods.items())
        self.own = peft.own_format(self.methods, fits, host.state_of(model).specs[name].tie)
        for path, method in self.methods.items():
            slot = slots[path]
            for leaf, t in params[path].items():
                if leaf not in method.leaves or method.leaves[leaf].derived or leaf in method.redrawn:  # what a batch brings, what the base gives
                    continue
                if shared := method.leaves[leaf].shared:
                    t = slot.whole(name)[leaf]
                key = peft.leaf_key(path, slot, method, leaf, {} if self.own else files)
                t = (t if shared else peft.packed(slot.site, method, leaf, t)).detach()
                self.tensors[key] = t if t.device.type == "meta" else t.to("cpu").contiguous().clone()
        if not self.own:
            self.tensors |= peft.tied_copies(slots, name)

    def _lora(self, slot: host.Slot, method: Method, p: Mapping[str, Tensor], must: bool) -> tuple[Method, Mapping[str, Tensor]]:
        two = None if method.replaces or method.bias(p, slot.site.bias) is not slot.site.bias else _two(slot, method, p)
        if two is None:
            return self._nearest(slot, method, p) if must and not method.replaces else (method, p)
        r = two[1].shape[-2]
        self.converted.append(slot.path)
        if self.rank is not None and r > self.rank:
            B, A, *self.errors[slot.path] = lower_rank(*two, self.rank)
            r = A.shape[-2]
            return LoRA(r, float(r)), {"A": A, "B": B}
        return LoRA(r, float(r)), {"A": two[1], "B": two[0]}

    @torch.no_grad()
    def _nearest(self, slot: host.Slot, method: Method, p: Mapping[str, Tensor]) -> tuple[Method, Mapping[str, Tensor]]:
        """The best LoRA of a rank (Eckart and Young), from the update as a matrix."""
        site, at, way = slot.site, slot.path or "the model", self.otherwise
        if method.mergeable == "no":
            raise LorakitError(f"{at}: {method.core.name} depends on its input, so no LoRA is near it; mend: {way}")
        if method.bias(dict(p), site.bias) is not site.bias:
            raise LorakitError(f"{at}: {method.core.name} changes the bias, which a LoRA cannot; mend: {way}, or merge it")
        W = Base(site).weight()
        U, S, V = thin_svd((each(site, method, method.weight, dict(p), W) - W).double())
        exact = max(1, int((S.amax(-1, keepdim=True) * max(W.shape[-2:]) * 1e-7 < S).sum(-1).max()))
        if self.rank is None:
            raise LorakitError(f"{at}: {method.core.name} is not exactly a plain LoRA of its own rank; mend: rank={exact} would be exact here, "
                               f"a lower one near it; or {way}")
        r = min(self.rank, S.shape[-1])
        self.converted.append(slot.path)
        self.errors[slot.path] = float(S[..., r:].norm()), float(S.norm())
        return LoRA(r, float(r)), {"B": (U[..., :r] * S[..., None, :r]).float(), "A": V[..., :r, :].float()}

    @property
    def relative_error(self) -> dict[str, Any] | None:
        """What the conversion left out, as a part of the update: by target, and of all that was converted so."""
        if not self.errors:
            return None
        parts = {p: left / whole if whole else 0.0 for p, (left, whole) in self.errors.items()}
        left, whole = (sum(e[n] ** 2 for e in self.errors.values()) ** 0.5 for n in (0, 1))
        return {"overall": left / whole if whole else 0.0, "modules": parts}


def _two(slot: host.Slot, method: Method, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    one = {k: t[0] if slot.site.stack and not method.leaves[k].shared else t for k, t in p.items()}
    return None if method.two(one) is None else each(slot.site, method, method.two, dict(p))


def _with_start(slot: host.Slot, name: str) -> tuple[Method, dict[str, Tensor]]:
    """An adapter that changed the base in memory is written as one that the untouched base can carry: its start as an offset."""
    method, p = slot.methods[name], slot.params(name)
    if slot.absorbed and slot.absorbed.adapter == name:
        if slot.absorbed.written:
            return slot.absorbed.written(slot, method, p)
        return method.over_core(Offset), p | {f"{k}0": v for k, v in slot.absorbed.p0.items()}
    return method, p


def _no_empty(tensors: Mapping[str, Tensor], path: Path) -> None:
    for k, t in tensors.items():
        if t.numel() == 0:
            raise LorakitError(f"{path}: the tensor {k} is empty (a sharded parameter that was not gathered?); nothing was written")
        if t.device.type == "meta":
            raise LorakitError(f"{path}: the tensor {k} has no values (meta device); nothing was written")


def _start(spec: Any, export: Export, own_base: str) -> str | None:
    """Of a start that is not zero: where it is kept, so that the base on disk stays as it was."""
    if own_base:
        return f"{spec.init}; the base was made anew with it and is kept in {own_base}"
    nests = [m for top in export.methods.values() for m in _nest(top)]
    how = ["as a plain LoRA of the whole update, of rank 2r"] * bool(export.converted)
    how += ["as factors and what they started from"] * any(isinstance(m, Offset) for m in nests)
    return f"{spec.init}; written {' or '.join(how)}: the base stays as it was" if spec.init and how else None


def _nest(method: Method) -> list[Method]:
    return [method, *(_nest(method.inner) if isinstance(method, Wrapper) else [])]


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
    out = {"format": peft.FORMAT, "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "adapter": name,
           "spec": spec.to_dict(), "start": _start(spec, export, state.own_base), "peft_type": config["peft_type"], "converted_to_lora": export.converted,
           "base": base | {"digest": digest(prints), "packed": described(model), "tensors": prints}, "modules": modules_table(model, name),
           "keys": {k: list(t.shape) for k, t in export.tensors.items()}, "versions": versions(), "lineage": list(lineage)}
    for p, (left, whole) in export.errors.items():  # the update that the file holds
        out["modules"][p] |= {"delta_norm": max(whole**2 - left**2, 0.0) ** 0.5, "rank": export.methods[p].r}
    if export.relative_error:
        out["conversion_error"] = export.relative_error
    if with_it is not None and not export.errors:  # those logits are not the file's
        out["probe"] = probe_record(with_it, without)
    return out


@dataclass(frozen=True)
class Part:
    """One target's share of a saved adapter: its method, and the leaves in the layout of PEFT's files. lookup: the target is an embedding."""

    method: Method
    leaves: Mapping[str, Tensor]
    lookup: bool = False

    def keyed(self, path: str) -> dict[str, Tensor]:
        """The leaves under the keys that they have in a folder."""
        return {f"{peft.PREFIX}{path}.{self.method.key(leaf, self.lookup)}": t for leaf, t in self.leaves.items()}


class Folder:
    """A saved adapter, read and checked: config, tensors, receipt (None for one that another library wrote)."""

    notes: Sequence[str] = ()  # what the reader of another format took to be so, or left out

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.is_file():
            raise LorakitError(f"{path} is a file, not an adapter folder; mend: lorakit convert {path} -o FOLDER --to peft")
        if not self.path.is_dir():
            there = [p.name for p in self.path.parent.iterdir()] if self.path.parent.is_dir() else []
            raise LorakitError(f"there is no adapter folder {self.path}{near(self.path.name, there, listing=False) if there else ''}")
        with reading(self.path):
            self.config = read_json(self.path / peft.CONFIG)
            peft.warn_of(self.config, self.path / peft.CONFIG)
            self.tensors = self._read = peft.restored(self.config, peft.read_tensors(self.path / peft.TENSORS, self.config))
            receipt = self.path / peft.RECEIPT
            self.receipt = read_json(receipt) if receipt.is_file() else None
            written = (self.receipt or {}).get("files", {})
            self.changed = next((f for f, was in written.items() if sha256(self.path / f) != was), None)  # not what the receipt was written for
        self.methods = peft.methods_of(self.config, self.tensors, self.path / peft.CONFIG)
        self._bound: nn.Module | None = None

    @classmethod
    def held(cls, path: Path, parts: Mapping[str, Part], notes: Sequence[str] = (), **config: Any) -> Folder:
        """An adapter that was read from another format, or made in memory: as if it lay in a folder of our own layout."""
        new = cls.__new__(cls)
        new.path, new.receipt, new.changed, new.notes, new._bound = path, None, None, notes, None
        new.methods = {p: part.method for p, part in parts.items()}
        new.config = config | {"peft_type": peft.OWN, "lorakit_format": peft.FORMAT, "modules": {p: m.to_dict() for p, m in new.methods.items()}}
        new.tensors = new._read = {k: t for p, part in parts.items() for k, t in part.keyed(p).items()}
        return new

    @staticmethod
    def there(path: Path) -> bool:
        """Whether a folder holds an adapter as this class reads it."""
        return (path / peft.TENSORS).is_file()

    def parts(self) -> dict[str, Part]:
        """Path -> method and leaves of every target, as far as the leaves are the target's own."""
        out = {}
        for p, m in self.methods.items():
            own = [k for k, leaf in m.leaves.items() if not (leaf.shared or leaf.derived)]
            lookup = any(m.key(k, True) != m.key(k) and f"{peft.PREFIX}{p}.{m.key(k, True)}" in self.tensors for k in own)
            keys = {k: f"{peft.PREFIX}{p}.{m.key(k, lookup)}" for k in own}
            out[p] = Part(m, {k: self.tensors[f] for k, f in keys.items() if f in self.tensors}, lookup)
        return out

    @property
    def base(self) -> str | None:
        """The base model's name or path, where the file says it."""
        return self.config.get("base_model_name_or_path")

    @property
    def main(self) -> Method:
        """The method that the adapter is of, what stands beside it aside."""
        main = [m for m in self.methods.values() if not m.replaces and not m.follows] or list(self.methods.values())
        return min(main, key=lambda m: isinstance(m, Around))  # what stands around the model is beside the rest

    @property
    def dropout(self) -> float:
        return self.config.get(self.main.core.peft_dropout or "lora_dropout") or 0.0

    def bind(self, model: nn.Module) -> None:
        """Reads the file's paths as those of this model."""
        if self._bound is model:
            return
        self._bound = model
        self.methods = peft.methods_of(self.config, self._read, self.path / peft.CONFIG, model)
        self.tensors, old = peft.as_now(self.config, self._read, self.methods, model)
        self.notes = [f"the factors of {old} fused experts lie as PEFT before 0.19 wrote them: turned"] if old else self.notes
        for p in self.spec.tied(model, self.methods)[1] if self.methods else ():
            self.methods.pop(p, None)

    @property
    def own(self) -> bool:
        return self.config.get("peft_type") == peft.OWN

    @property
    def spec(self) -> Spec:
        extra = Spec.from_dict(self.receipt["spec"]) if self.receipt else None
        kept = {} if extra is None else {"freeze": tuple(f for f in extra.freeze if f in self.main.leaves), "recipe": extra.recipe, "seed": extra.seed}
        return Spec(self.main, tuple(p for p, m in self.methods.items() if not m.replaces), tie=bool(self.config.get("ensure_weight_tying")),
                    dropout=self.dropout if extra is None else extra.dropout, **kept)

    def replaces(self, name: str) -> bool:
        """Whether a tensor of the base is one that this adapter replaces whole."""
        return any(m.replaces for p in (name, name.rpartition(".")[0]) if (m := self.methods.get(p)) is not None)

    def plan(self, model: nn.Module) -> dict[str, Method]:
        """Path on this model -> method. LorakitError where the model has no such module."""
        if not self.methods:
            keys = ", ".join(list(self.tensors)[:3])
            raise LorakitError(f"{self.path}: no tensor has a key of this method; the file holds {keys or 'nothing'}")
        self.bind(model)
        modules = dict(host.walk(model))
        for p in self.methods:
            if place(modules, p) is None:
                raise LorakitError(f"{self.path}: the adapter has `{p}`, which this {type(model).__name__} has not{near(p, [n for n in modules if n])}")
        order = {n: k for k, n in enumerate(modules)}
        return {p: self.methods[p] for p in sorted(self.methods, key=lambda p: order[p if p in order else place(modules, p).owner])}


def _same_base(model: nn.Module, folder: Folder) -> None:
    was = folder.receipt["base"]["tensors"]
    now = {n: p for n, p in fingerprint(model).items() if not folder.replaces(n)}
    if diff := compare_bases(was, now):
        more = f" (and {len(diff) - 3} more)" if len(diff) > 3 else ""
        raise LorakitError(f"{folder.path} was trained on another base ({folder.receipt['base'].get('name')}): {'; '.join(diff[:3])}{more}. "
                           "Mend: load that base, or pass check_base=False if you know better")


def other_tables(model: nn.Module, folder: Folder) -> list[str]:
    """Adapted tables of which PEFT kept a copy in the file, and which are not those of this base; one line each."""
    slots, out = host.slots(model), []
    for k in [k for k in folder.tensors if k.endswith(COPY)]:
        path = k.removeprefix(peft.PREFIX).removesuffix(COPY)
        slot, was = slots.get(path), folder.tensors[k]
        here = slot.site.store.read().detach().cpu() if slot else None
        if here is not None and (here.shape != was.shape or not torch.equal(here.to(torch.bfloat16), was.to(torch.bfloat16))):
            out.append(f"{path}: the file's copy of its weight {list(was.shape)} is not this base's {list(here.shape)}")
    return out


def fill(model: nn.Module, name: str, folder: Folder) -> None:
    """Sets an adapter's leaves from a folder."""
    put_tensors(model, name, folder.tensors, folder.own, folder.path / peft.TENSORS if folder.path.is_dir() else folder.path)


@torch.no_grad()
def put_tensors(model: nn.Module, name: str, given: Mapping[str, Tensor], own: bool, where: Path) -> None:
    """Sets an adapter's leaves from tensors under a file's keys. LorakitError for a key too many or too few, a wrong shape, NaN or infinity."""
    sharded(model)
    slots = host.slots(model, name)
    methods = {p: s.methods[name] for p, s in slots.items() if name not in s.tied}
    files = {} if own else peft.file_paths(dict(model.named_modules()), methods) or {}
    places = peft.expected(slots, name, files)
    tensors = dict(given)
    for k in [k for k in tensors if k.endswith(COPY) or any(part in k and k.replace(part, ".") in tensors for part in peft.TWICE)]:
        del tensors[k]
    copies = {k: tensors.pop(k) for k in ({} if own else peft.tied_copies(slots, name)) if k in tensors}
    _same_start(model, name, tensors, where)
    if taken := _same_rounds(model, name, tensors, where):
        places = {k: v for k, v in places.items() if v[0].path not in taken}
    places = {k: at for k, at in places.items() if k in tensors or at[1] not in at[0].methods[name].redrawn}
    missing = [k for k in places if k not in tensors]
    unused = [k for k in tensors if k not in places]
    if missing:
        raise LorakitError(f"{where}: the tensor `{missing[0]}` is missing{_and(missing)}{near(missing[0], unused, 1) if unused else ''}")
    if unused:
        raise LorakitError(f"{where}: the tensor `{unused[0]}` has no place in this model{_and(unused)}{near(unused[0], places, 1)}")
    for k, (slot, leaf) in places.items():
        spec = slot.methods[name].leaves[leaf]
        here = slot.module._modules[slot.attr(name, leaf)]._parameters[name]
        want = here.shape if spec.shared else peft.packed(slot.site, slot.methods[name], leaf, torch.empty(here.shape, device="meta")).shape
        if tensors[k].shape != want:
            raise LorakitError(f"{where}: `{k}` has shape {list(tensors[k].shape)}, this model and configuration need {list(want)}")
        value = tensors[k] if spec.shared else peft.unpacked(slot.site, slot.methods[name], leaf, tensors[k], here.shape)
        if not torch.isfinite(value).all():
            raise LorakitError(f"{where}: `{k}` holds NaN or infinity")
        here.copy_(cut(value, here))
    for k, t in (peft.tied_copies(slots, name) if copies else {}).items():
        if k in copies and not torch.equal(copies[k].to(t), t):
            raise LorakitError(f"{where}: `{k}` belongs to a weight that is tied to the embedding, but is not the embedding's adapter")


def _same_start(model: nn.Module, name: str, tensors: dict[str, Tensor], where: Path) -> None:
    """Takes out the frozen copies of a start that is in this model's base already, after checking that it is the same start."""
    for path, slot in host.slots(model, name).items():
        if slot.absorbed and slot.absorbed.adapter == name and not slot.absorbed.written:
            written = slot.methods[name].over_core(Offset)
            for leaf, t in slot.absorbed.p0.items():
                key = f"{peft.PREFIX}{path}.{written.key(f'{leaf}0', slot.site.lookup)}"
                if key not in tensors or not torch.equal(slot.site.unpack(tensors.pop(key), written.leaves[f"{leaf}0"].axes).to(t), t):
                    raise LorakitError(f"{where}: `{key}` is not the start that was taken out of this base; mend: the same seed and init as then")


def _same_rounds(model: nn.Module, name: str, tensors: dict[str, Tensor], where: Path) -> set[str]:
    """Targets whose base has taken in rounds of training and whose leaves are set with them; takes their tensors out, after checking them."""
    taken = {p for p, s in host.slots(model, name).items() if s.absorbed and s.absorbed.adapter == name and s.absorbed.written}
    here = Export(model, name).tensors if taken else {}
    for k in [k for k in tensors if k.startswith(tuple(f"{peft.PREFIX}{p}." for p in taken))]:
        if k not in here or not torch.equal(here[k].to(tensors[k]), tensors.pop(k)):
            raise LorakitError(f"{where}: `{k}` is not what the rounds of training that this base holds amount to; mend: the hooks' state that was "
                               "saved beside it")
    return taken


def _and(keys: Sequence[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def load(model: nn.Module, path: str | Path | Folder, name: str, check_base: bool = True) -> Folder:
    """Puts a saved adapter on the model and makes it the active one.

    Every tensor must find its place and every place its tensor; with a receipt the files must be those it was written for
    and the base's fingerprint must match (`check_base`). Raises LorakitError otherwise and leaves the model as it was.
    """
    folder = path if isinstance(path, Folder) else Folder(path)
    folder.bind(model)
    if check_base and folder.receipt:
        _same_base(model, folder)
    plan = folder.plan(model)
    with host.tentative(model, name):
        attach(model, name, folder.spec, plan, empty=True)
        fill(model, name, folder)
        if check_base and (other := other_tables(model, folder)):
            raise LorakitError(f"{folder.path} was trained on another base: {other[0]}. Mend: load that base, or pass check_base=False if you know better")
        if check_base and folder.changed:
            raise LorakitError(f"{folder.path / folder.changed} is not the file its receipt was written for: it changed after saving. Mend: bring "
                               "it back, or, if the change was meant, delete receipt.json or pass check_base=False")
    return folder


@contextmanager
def beside(model: nn.Module, folder: Folder, check_base: bool = True) -> Iterator[str]:
    """Inside, a saved adapter is on the model under the name handed out, beside those that were there; after, the model is as before."""
    name, state = "beside_", host.find_state(model)
    active = state.active if state else {}
    load(model, folder, name, check_base)
    try:
        yield name
    finally:
        host.delete(model, name)
        if state:
            state.active = active
