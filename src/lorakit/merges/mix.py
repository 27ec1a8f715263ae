"""Several adapters made one, target by target: read, merged by a rule, brought to a rank, reported, written whole or not at all."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lorakit import host
from lorakit.errors import LorakitError
from lorakit.formats import folder as files
from lorakit.formats import lineage
from lorakit.formats.files import new_folder, sha256, write_json
from lorakit.formats.folder import Folder, Part
from lorakit.formats.peft import FORMAT, RECEIPT
from lorakit.formats.peft_folder import write
from lorakit.formats.receipt import compare_bases, versions
from lorakit.formats.vllm import KEPT
from lorakit.merges import ROWS
from lorakit.merges import report as told
from lorakit.merges.base import At, Rule, Vector, build, project
from lorakit.merges.sources import InFolder, OnModel, Source
from lorakit.method import Method
from lorakit.methods.lora import LoRA
from lorakit.proof import Report, verify
from lorakit.recipes import compose
from lorakit.spec import attach

Copies = Mapping[str, tuple[Method, Mapping[str, Tensor]]]  # target -> what replaces it, and its leaves
Stats = Mapping[str, Tensor] | str | Path  # target -> statistic, or a safetensors file of them
ROUNDING = 1e-6  # a mix smaller than this part of what went in is nothing
MIX, PICTURE = "mix.json", "mix.png"


@dataclass
class Mixed:
    """What `mix` did. error: the norm of what the rank left out, as a part of the merged update's; of each target, and overall."""

    output: str
    rule: str
    options: dict[str, Any]
    weights: list[float]
    sources: list[dict[str, Any]]
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    error: float = 0.0
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)  # target -> figures of `lorakit.merges.report`
    summary: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    verified: dict[str, Any] | None = None  # None: no base at hand

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def __str__(self) -> str:
        how = ", ".join(f"{k} {v}" for k, v in self.options.items() if v is not None)
        lines = [f"{self.rule}{f' ({how})' if how else ''}: {len(self.ranks)} targets, rank {_span(list(self.ranks.values()))}"]
        lines += [f"  {w:+g} × {s['adapter']}" for w, s in zip(self.weights, self.sources, strict=True)]
        lines.append(f"  left out by the rank: {self.error:.2%} of the merged update's norm")
        if self.summary:
            lines.append("  " + ", ".join(f"{label} {self.summary[k]:.3f}" for k, label in told.PANELS))
        lines += [f"  {n}" for n in self.notes]
        lines.append("  verified on the base" if self.verified else "  not verified: no base at hand")
        return "\n".join(lines)


def _span(ranks: list[int]) -> str:
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


class Mixing:
    """Sources, a rule and weights that fit together: gives the merged factors of one target after the other."""

    def __init__(self, sources: Sequence[Source], rule: str, weights: Sequence[float] | None, rank: int | None, seed: int, stats: Sequence[Stats] | None,
                 options: dict[str, Any], niter: int = 0):
        self.sources, self.rank, self.seed, self.niter = sources, rank, seed, niter
        self.rule: Rule = build(rule, ROWS, options)
        self.weights = [1.0] * len(sources) if weights is None else [float(w) for w in weights]
        every = dict.fromkeys(p for s in sources for p in s.paths)
        self.whole = [p for p in every if all(s.copy(p) for s in sources if p in s.paths)]  # targets that are trained whole, wherever they are
        self.paths = [p for p in every if p not in self.whole]
        self._check(rule, weights)
        self.stats = self._opened(stats)
        self.size = 0.0  # Σ (w_t |ΔW_t|)² over what was read

    def _check(self, name: str, given: Sequence[float] | None) -> None:
        n, w = len(self.sources), self.weights
        if not self.paths:
            raise LorakitError("mix: the adapters have no target on which a rule could act")
        if len(w) != n:
            raise LorakitError(f"mix: {n} adapters but {len(w)} weights")
        if bad := [x for x in w if not math.isfinite(x)]:
            raise LorakitError(f"mix: a weight is {bad[0]}")
        if not any(w):
            raise LorakitError("mix: all weights are 0, so that nothing would be left")
        if not self.rule.weighs and given is not None and len(set(w)) > 1:
            raise LorakitError(f"mix: {name} finds its weights by itself; mend: leave the weights out")
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise LorakitError(f"mix: the rank must be at least 1, not {self.rank}")
        if not isinstance(self.niter, int) or self.niter < 0:
            raise LorakitError(f"mix: niter must be at least 0, not {self.niter}")
        self.rule.check(w)

    def _opened(self, stats: Sequence[Stats] | None) -> list[Mapping[str, Tensor] | Any]:
        needs, n = self.rule.needs, len(self.sources)
        if bool(needs) != (stats is not None):
            name = self.rule.name
            raise LorakitError(f"mix: {name} needs the `{needs}` statistics of every adapter; mend: stats=[…], from lorakit.merges.stats, or --data" if needs
                               else f"mix: {name} looks at no statistics; mend: leave stats out")
        if stats is not None and len(stats) != n:
            raise LorakitError(f"mix: {n} adapters but statistics of {len(stats)}")
        return [s if isinstance(s, Mapping) else _Lazy(Path(s)) for s in stats or ()]

    @torch.no_grad()
    def copies(self) -> Copies:
        """Targets trained whole (a head): the mean of the copies, weighted. No rule acts on them: what they were before is not known."""
        out = {}
        for path in self.whole:
            some = [(c, w) for s, w in zip(self.sources, self.weights, strict=True) if (c := s.copy(path))]
            (method, first), size = some[0][0], sum(w for _, w in some)
            if any(p.keys() != first.keys() for (_, p), _ in some):
                raise LorakitError(f"{path}: trained whole, with its bias in some of the adapters and without in others, so that they have no mean")
            if not size:
                raise LorakitError(f"{path}: trained whole, and the weights of its copies sum to 0, so that they have no mean; mend: other weights")
            out[path] = method, {k: sum(p[k] * (w / size) for (_, p), w in some) for k in first}
        return out

    def vectors(self, path: str) -> list[Vector]:
        """The task vectors of one target, of rank 0 where an adapter lacks it. LorakitError where their shapes differ."""
        found = [s.vector(path) if path in s.paths else None for s in self.sources]
        shapes = {v.shape: s.name for s, v in zip(self.sources, found, strict=True) if v is not None}
        if len(shapes) > 1:
            (a, one), (b, other) = list(shapes.items())[:2]
            raise LorakitError(f"{path}: an update of shape {list(a)} in {one}, {list(b)} in {other}: they are not adapters of one base")
        return [Vector.zero(next(iter(shapes))) if v is None else v for v in found]

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[str, list[Vector], Vector]]:
        """(target, its task vectors, what the rule makes of them), one target at a time."""
        whole = self.rule.survey(lambda: ((p, self.vectors(p)) for p in self.paths), len(self.sources))
        for path in self.paths:
            vectors = self.vectors(path)
            stats = [s.get(path) for s in self.stats]
            for s, t in zip(self.sources, stats, strict=bool(stats)):
                *_, o, i = vectors[0].shape
                if t is not None and (tuple(t.shape) not in ((o, i), (i, i)) or not torch.isfinite(t).all()):
                    raise LorakitError(f"{path}: the statistics of {s.name} have shape {list(t.shape)}, or hold NaN; they are not of this target")
            yield path, vectors, self.rule.merge(vectors, self.weights, At(path, host.generator(self.seed, path), whole, stats))
            del vectors  # before the next are read

    @torch.no_grad()
    def run(self, see: Callable[[str, list[Vector], Vector], None] | None = None) -> Iterator[tuple[str, Tensor, Tensor, float, float]]:
        """(target, B, A, norm left out, norm of the merged update), one target at a time."""
        for path, vectors, merged in self.merged():
            self.size += sum((w * v.norm()) ** 2 for v, w in zip(vectors, self.weights, strict=True))
            rank = self._rank(path, vectors, merged)
            B, A, left, norm = project(merged, rank, self.niter, sum(v.rank if v.factors else rank or 0 for v in vectors))
            if see is not None:
                see(path, vectors, Vector((B, A)))
            yield path, B, A, left, norm

    def _rank(self, path: str, vectors: Sequence[Vector], merged: Vector) -> int | None:
        if self.rank is not None or (merged.factors is not None and not self.rule.lowers):
            return self.rank
        ranks = [v.rank for v in vectors if v.rank]
        if not (self.rule.full or self.rule.lowers) or not ranks:
            raise LorakitError(f"{path}: the mixed update is no product of thin factors there; mend: rank=R, for the nearest of rank R (its error is said)")
        return max(ranks)


class _Lazy:
    """Statistics in a file, each read when its target comes."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise LorakitError(f"there is no file of statistics {path}")
        self.file = safe_open(path, "pt")
        self.keys = set(self.file.keys())

    def get(self, path: str) -> Tensor | None:
        return self.file.get_tensor(path) if path in self.keys else None


# On a model


@torch.no_grad()
def put(model: nn.Module, name: str, factors: Mapping[str, tuple[Tensor, Tensor]], tie: bool, dropout: float, copies: Copies | None = None) -> None:
    """Puts B and A of every target on the model as a plain LoRA, and whole copies, beside the others and not active."""
    copies = copies or {}
    plan: dict[str, Method] = {p: LoRA(A.shape[-2], float(A.shape[-2])) for p, (_, A) in factors.items()}
    rank = max(m.r for m in plan.values())
    state = host.find_state(model)
    active = dict(state.active) if state else {}
    attach(model, name, compose(LoRA(rank, float(rank)), target_modules=list(plan), tie=tie, dropout=dropout),
           plan | {p: m for p, (m, _) in copies.items()}, empty=True)
    host.state_of(model).active = active
    slots = host.slots(model, name)
    for path, leaves in ({p: {"B": B, "A": A} for p, (B, A) in factors.items()} | {p: t for p, (_, t) in copies.items()}).items():
        for leaf, t in leaves.items():
            slots[path].params(name)[leaf].copy_(t)


def _like(model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """What the new adapter takes over from the others: ties and dropout. LorakitError where they differ in what is tied."""
    specs = [host.state_of(model).specs[n] for n in names]
    if len({s.tie for s in specs}) > 1:
        raise LorakitError("mix: a head follows its tied embedding's adapter in some of the adapters and not in others")
    return {"tie": specs[0].tie, "dropout": specs[0].dropout}


def mix_on(model: nn.Module, names: Sequence[str], new_name: str, rule: str, weights: Sequence[float] | None, rank: int | None, seed: int,
           stats: Sequence[Stats] | None, options: dict[str, Any], niter: int = 0) -> Mixed:
    """Adapters of a model as a new one beside them, not active."""
    if new_name in host.known(model, names).specs:
        raise LorakitError(f"the model has an adapter `{new_name}` already")
    m = Mixing([OnModel(model, n) for n in names], rule, weights, rank, seed, stats, options, niter)
    done = Mixed(new_name, rule, m.rule.to_dict(), m.weights, [{"adapter": n} for n in names])
    like = _like(model, names)
    put(model, new_name, _collect(m, done), **like, copies=m.copies())
    return done


def _collect(m: Mixing, done: Mixed, see: Callable | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    factors, square = {}, [0.0, 0.0]
    for path, B, A, left, norm in m.run(see):
        factors[path] = B.contiguous(), A.contiguous()
        done.ranks[path], done.errors[path] = A.shape[-2], left / norm if norm else 0.0
        square = [square[0] + left**2, square[1] + norm**2]
    if square[1] <= ROUNDING**2 * m.size:
        raise LorakitError("mix: the mixed update is zero on every target")
    done.error = math.sqrt(square[0] / square[1])
    return factors


# Folders


def mix(adapters: Sequence[str | Path], output: str | Path, rule: str, weights: Sequence[float] | None, rank: int | None, model: nn.Module | None, seed: int,
        stats: Sequence[Stats] | None, check_base: bool, options: dict[str, Any], niter: int = 0) -> Mixed:
    """Saved adapters as a new folder; all of it appears, checked, or nothing. model: their base, where it is at hand."""
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise LorakitError(f"{output} is there already; mend: another name, or take it away first")
    build(rule, ROWS, options)  # says what is wrong before anything is read
    folders = [Folder(a) for a in adapters]
    notes = one_base(folders) if check_base else []
    before = _earlier(folders)
    with ExitStack() as stack:
        sources = [InFolder(f) for f in folders] if model is None else [loaded(model, f, n, check_base, stack) for n, f in enumerate(folders)]
        m = Mixing(sources, rule, weights, rank, seed, stats, options, niter)
        done = Mixed(str(output), rule, m.rule.to_dict(), m.weights, [_said(f) for f in folders], notes=notes)
        like = None if model is None else _like(model, [s.adapter for s in sources])

        def see(path: str, vectors: list[Vector], merged: Vector) -> None:
            done.modules[path] = told.row(vectors, m.weights, merged)

        factors, copies = _collect(m, done, see), m.copies()
    done.notes += [f"{p}: trained whole, so the weighted mean of its copies" for p in copies]
    done.notes += [f"matrices brought to their rank by {niter} rounds of subspace iteration: nearly the nearest"] if niter else []
    done.summary = told.overall(done.modules)
    steps = [*before, *(lineage.entry(f, "mix")[-1] | {"weight": w} for f, w in zip(folders, m.weights, strict=True))]
    with new_folder(output) as tmp:
        if model is None:
            done.notes += _write(tmp, folders, factors, done, steps)
        else:
            _save(tmp, model, factors, dict(like) | {"copies": copies}, steps, {k: v for k in KEPT[:3] if (v := folders[0].config.get(k)) is not None})
        _finish(tmp, done)
        done.verified = _proved(tmp, model, factors)
        write_json(tmp / MIX, done.to_dict())
    return done


def one_base(folders: Sequence[Folder]) -> list[str]:
    """Notes. LorakitError where two adapters were trained on different bases."""
    first, notes = next((f for f in folders if f.receipt), None), []
    for f in folders:
        if f.changed:
            raise LorakitError(f"{f.path / f.changed} is not the file its receipt was written for: it changed after saving. Mend: bring it back, or, if the "
                               "change was meant, delete receipt.json or pass check_base=False")
        if f.receipt is None:
            notes.append(f"{f.path} has no receipt: nothing says which base it was trained on")
        elif f is not first:
            a, b = ({n: p for n, p in g.receipt["base"]["tensors"].items() if not (first.replaces(n) or f.replaces(n))} for g in (first, f))
            if diff := compare_bases(a, b):
                more = f" (and {len(diff) - 3} more)" if len(diff) > 3 else ""
                raise LorakitError(f"{first.path} and {f.path} were trained on different bases: {'; '.join(diff[:3])}{more}. Mend: adapters of one base, or "
                                   "pass check_base=False if you know better")
    return notes


def _earlier(folders: Sequence[Folder]) -> list[dict[str, Any]]:
    """The earlier adapters over which the sources were trained: the same for all, or LorakitError."""
    every = [[s for s in (f.receipt or {}).get("lineage", []) if s["stage"] not in lineage.HELD] for f in folders]
    for f, steps in zip(folders, every, strict=True):
        if [(s["stage"], s.get("files")) for s in steps] != [(s["stage"], s.get("files")) for s in every[0]]:
            raise LorakitError(f"{folders[0].path} and {f.path} were trained over different earlier adapters, so that they add to different weights")
    return every[0] if every else []


def _said(f: Folder) -> dict[str, Any]:
    receipt = f.receipt or {}
    return {"adapter": str(f.path), "files": receipt.get("files") or {p.name: sha256(p) for p in sorted(f.path.iterdir()) if p.is_file()},
            "base": receipt.get("base", {}).get("digest")}


def loaded(model: nn.Module, f: Folder, n: int, check_base: bool, stack: ExitStack) -> OnModel:
    """The adapter on the base until the stack closes."""
    name, state = f"mixed{n}_", host.find_state(model)
    active = dict(state.active) if state else {}
    files.load(model, f, name, check_base)
    host.state_of(model).active = active
    stack.callback(host.delete, model, name)
    return OnModel(model, name, str(f.path))


def _save(tmp: Path, model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], like: Mapping[str, Any], steps: Sequence[Mapping[str, Any]],
          config: Mapping[str, Any]) -> None:
    name, state = "mixed_", host.find_state(model)
    active = dict(state.active) if state else {}
    put(model, name, factors, **like)
    try:
        files.save(model, tmp, name, lineage=steps, config=config)
    finally:
        host.delete(model, name)
        if state:
            state.active = active


def _write(tmp: Path, folders: Sequence[Folder], factors: Mapping[str, tuple[Tensor, Tensor]], done: Mixed, steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Without the base. Factors get the layout of their sources' (an embedding, a kernel's shape)."""
    parts, had = {}, [f.parts() for f in folders]
    for path, (B, A) in factors.items():
        like = next(p[path] for p in had if path in p)
        tail = like.leaves["A"].shape[2:] if "A" in like.leaves else ()
        kernel = (A.shape[0], A.shape[1] // math.prod(tail), *tail) if tail else A.shape
        parts[path] = Part(LoRA(A.shape[0], float(A.shape[0])), {"A": A.reshape(kernel), "B": B.reshape(*B.shape, *(1 for _ in tail))}, like.lookup)
    kept = {k: v for k in KEPT if (v := next((f.config[k] for f in folders if f.config.get(k)), None)) is not None}
    made = Folder.held(folders[0].path, parts, **kept)
    made.receipt = _receipt(folders, parts, done, steps)
    return write(made, tmp, None)


def _receipt(folders: Sequence[Folder], parts: Mapping[str, Part], done: Mixed, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What can be said without the base: whose fingerprint the sources have, and the size of every update."""
    known = [f.receipt for f in folders if f.receipt]
    if not known:
        return None
    modules = {}
    for p, part in parts.items():
        base = next((r["modules"][p]["base_norm"] for r in known if p in r["modules"]), None)
        numbers = sum(t.numel() for t in part.leaves.values())
        modules[p] = {"method": part.method.name, "delta_norm": done.modules[p]["norm"], "base_norm": base, "trainable": numbers, "parameters": numbers,
                      "rank": part.method.r}
    rank = max(part.method.r for part in parts.values())
    return {"format": FORMAT, "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "adapter": "default", "peft_type": "LORA",
            "spec": compose(LoRA(rank, float(rank)), target_modules=list(parts)).to_dict(), "converted_to_lora": [], "base": known[0]["base"],
            "modules": modules, "versions": versions(), "lineage": list(steps)}


def _finish(tmp: Path, done: Mixed) -> None:
    """What the mix was goes into the receipt, and a picture beside it where matplotlib is installed."""
    path = tmp / RECEIPT
    if path.is_file():
        receipt = json.loads(path.read_text(encoding="utf-8"))
        what = {"rule": done.rule, "options": done.options, "weights": done.weights, "sources": done.sources, "error": done.error, "errors": done.errors}
        write_json(path, receipt | {"mix": what})
    try:
        told.picture(done.modules, f"{done.rule} of {len(done.sources)} adapters", tmp / PICTURE)
    except LorakitError as e:
        done.notes.append(f"no picture: {e}")


def _proved(tmp: Path, model: nn.Module | None, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any] | None:
    """Reads the folder back and compares; with the base, verifies it. LorakitError where it is not what was meant."""
    parts = Folder(tmp).parts()
    for path, (B, A) in factors.items() if model is None else ():
        if path not in parts or not all(torch.equal(parts[path].leaves[k].reshape(t.shape), t) for k, t in (("A", A), ("B", B))):
            raise LorakitError(f"{tmp}: read back, {path} is not what was written")
    if model is None:
        return None
    report: Report = verify(tmp, model)
    report.raise_if_failed()
    return report.to_dict()
