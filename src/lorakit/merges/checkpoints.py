"""Whole checkpoints mixed with each other and with adapters, a tensor at a time, without a model in memory.

    W = W_0 + rule(W_1 - W_0, …, W_n - W_0)      of every tensor of the base's files; an adapter on the base counts as what it adds to W_0
    W = rule(W_1, …, W_n)                        without a base, for the rules of which equal weights come out as they went in (a soup, SLERP)

The rules are those of adapters, on float32 matrices; no rank is cut. What is written is the folder of the base (of the first checkpoint, where there is
no base), in its dtypes, shards and names. Memory: one float32 tensor for each source and a few more, of the largest there is.
"""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.formats import lineage
from lorakit.formats.files import new_folder, write_json
from lorakit.formats.folder import Folder
from lorakit.formats.receipt import sample
from lorakit.merges import ROWS
from lorakit.merges.base import Vector, build
from lorakit.merges.mix import MIX, Mixing, Stats, one_base
from lorakit.merges.sources import factored
from lorakit.merges.streamed import Entry, Layout, checkpoint, copied, entries, finite, leaves_at
from lorakit.sites import Site


@dataclass
class MixedCheckpoint:
    """What `mix_checkpoints` did. changed: names of the tensors that are not the base's (the first checkpoint's, without one) to the bit."""

    output: str
    rule: str
    options: dict[str, Any]
    weights: list[float]
    sources: list[str]
    base: str | None
    tensors: int = 0
    changed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def __str__(self) -> str:
        how = ", ".join(f"{k} {v}" for k, v in self.options.items() if v is not None)
        lines = [f"{self.rule}{f' ({how})' if how else ''} on {self.base or 'no base'}: {len(self.changed)} of {self.tensors} tensors changed"]
        return "\n".join([*lines, *(f"  {w:+g} × {s}" for w, s in zip(self.weights, self.sources, strict=True)), *(f"  {n}" for n in self.notes)])


class Frame:
    """The checkpoint whose names, shapes and dtypes the result has: the base, or, without one, the first source.

    at: key -> name in the files and site; the key of a layer's weight is the layer's path, as an adapter knows it, that of another tensor its name.
    """

    def __init__(self, folder: Path, skeleton: nn.Module | None, based: bool):
        checkpoint(folder)
        self.folder, self.there, self.based = folder, entries(folder), based
        self.layout = skeleton and Layout(skeleton, self.there)
        sites = self.layout.sites() if self.layout else {}
        self.at: dict[str, tuple[str, Site | None]] = {}
        for name, entry in self.there.items():
            path, site = sites.get(name, (name, None))
            if entry.dtype is not None and 0 not in entry.shape:
                self.at[path] = name, site
        self._last: tuple[str, Tensor] | None = None

    def weight(self, key: str) -> Tensor:
        """W_0 as it is stored, in float32."""
        if self._last is None or self._last[0] != key:
            self._last = None
            self._last = key, _finite(self.there[self.at[key][0]], self.at[key][0])
        return self._last[1]

    def view(self, key: str, W: Tensor) -> Tensor:
        """(…, o, i) as a rule sees it; what is no layer's weight as it is stored, a vector as one row."""
        site = self.at[key][1]
        return W.reshape(1, -1) if W.dim() < 2 else W if site is None else site.view(W)

    def unview(self, key: str, M: Tensor) -> Tensor:
        name, site = self.at[key]
        return M.reshape(self.there[name].shape) if site is None else site.unview(M)


def _finite(entry: Entry, name: str) -> Tensor:
    W = entry.read().float()
    if not finite(W):
        raise LorakitError(f"{name} in {entry.file} holds NaN or infinity; mend: leave this checkpoint out, or save it again")
    return W


class Whole:
    """A checkpoint, as what it has more than the base; without a base, as its weights."""

    def __init__(self, folder: Path, frame: Frame):
        checkpoint(folder)
        self.name, self.frame, self.there, self.paths = str(folder), frame, entries(folder), list(frame.at)
        self._alike()

    def _alike(self) -> None:
        """LorakitError unless every tensor has its counterpart in the frame, of the same shape; what holds no floating-point numbers must be equal."""
        base, here = self.frame.there, self.there
        for name in [*base, *here]:
            if name not in here or name not in base:
                has, lacks, entry = (self.frame.folder, self.name, base[name]) if name in base else (self.name, self.frame.folder, here[name])
                raise LorakitError(f"{name}: in {entry.file.relative_to(has)} of {has}, not in {lacks}; mend: checkpoints of one architecture, tied or untied "
                                   "(tie_word_embeddings) alike")
            a, b = base[name], here[name]
            if a.shape != b.shape:
                raise LorakitError(f"{name}: {list(a.shape)} in {a.file}, {list(b.shape)} in {b.file}; mend: checkpoints of one architecture and vocabulary")
            if (a.dtype is None or b.dtype is None) and a.bytes() != b.bytes():
                raise LorakitError(f"{name}: {a.kind} in {a.file}, {b.kind} in {b.file}: no floating-point numbers of at least 16 bits, and not equal; "
                                   "mend: checkpoints that are not quantised")

    def copy(self, path: str) -> None:
        """A head that was trained whole is a difference like any other, for the base is at hand."""

    def vector(self, path: str) -> Vector:
        name = self.frame.at[path][0]
        W = _finite(self.there[name], name)
        return Vector(matrix=self.frame.view(path, W.sub_(self.frame.weight(path)) if self.frame.based else W))


class OnBase:
    """An adapter, as what it adds to the base's weights."""

    def __init__(self, folder: Folder, frame: Frame, check_base: bool):
        self.name, self.frame, self.parts = str(folder.path), frame, folder.parts()
        for path in self.parts:
            frame.layout.at(path)
        self.paths = list(self.parts)
        receipt = folder.receipt or {}
        if any(s["stage"] not in (*lineage.HELD, "merge") for s in receipt.get("lineage", ())):
            raise LorakitError(f"{self.name} was trained beside earlier adapters, which are no part of it; mend: lorakit.mix without a checkpoint to write")
        self.prints = receipt["base"]["tensors"] if check_base and receipt else {}

    def copy(self, path: str) -> None:
        """As for `Whole`."""

    def vector(self, path: str) -> Vector:
        part, (name, site) = self.parts[path], self.frame.at[path]
        W = self.frame.weight(path)
        if (was := self.prints.get(f"{path}.weight")) and was["values"] != sample(W):
            raise LorakitError(f"{self.name} was trained on another base: {name} in {self.frame.there[name].file} has other values. Mend: that base, or pass "
                               "check_base=False if you know better")
        p = leaves_at(path, part, site)
        for key, t in part.keyed(path).items():
            if not torch.isfinite(t).all():
                raise LorakitError(f"{self.name}: `{key}` holds NaN or infinity")
        W = site.view(W)
        return factored(part.method, p) or Vector(matrix=part.method.weight(p, W) - W)


def whole(path: str | Path) -> bool:
    """Whether a folder holds a whole model, not an adapter."""
    return (Path(path) / "config.json").is_file() and not Folder.there(Path(path))


@torch.no_grad()
def mix_checkpoints(sources: Sequence[str | Path], output: str | Path, rule: str, weights: Sequence[float] | None, base: str | Path | None,
                    skeleton: nn.Module | None, seed: int, stats: Sequence[Stats] | None, check_base: bool, options: dict[str, Any]) -> MixedCheckpoint:
    """Writes a mix as a checkpoint; all of it appears, or nothing. skeleton: the model on the meta device; needed where a source is an adapter."""
    output, folders = Path(output), [Path(s) for s in sources]
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise LorakitError(f"{output} is there already; mend: another name, or take it away first")
    build(rule, ROWS, options)  # says what is wrong before anything is read
    adapters = {n: Folder(f) for n, f in enumerate(folders) if not whole(f)}
    if adapters and (base is None or skeleton is None):
        raise LorakitError(f"mix: {adapters[min(adapters)].path} is an adapter, and the base is needed to make a checkpoint of it; mend: base=, or --base")
    frame = Frame(Path(base) if base is not None else folders[0], skeleton, base is not None)
    notes = one_base(list(adapters.values())) if check_base else []
    every = [OnBase(adapters[n], frame, check_base) if n in adapters else Whole(f, frame) for n, f in enumerate(folders)]
    if weights is None and base is None:
        weights = [1 / len(every)] * len(every)
    m = Mixing(every, rule, weights, None, seed, stats, options)
    if base is None:
        m.rule.without_base(m.weights)
    done = MixedCheckpoint(str(output), rule, m.rule.to_dict(), m.weights, [str(f) for f in folders], None if base is None else str(base), notes=notes)
    done.notes += [f"{f}: another {t} than {frame.folder}'s, which is kept" for f in folders for t in ("tokenizer.json", "tokenizer.model")
                   if (f / t).is_file() and (frame.folder / t).is_file() and not filecmp.cmp(f / t, frame.folder / t, shallow=False)]
    with new_folder(output) as tmp:
        there = copied(frame.folder, tmp)
        done.tensors = len(there)
        for path, vectors, merged in m.merged():
            name, W = frame.at[path][0], frame.unview(path, merged.dense())
            vectors.clear()  # what is not needed any more is not kept
            del merged
            value = (W.add_(frame.weight(path)) if frame.based else W).to(there[name].dtype)
            del W
            if not finite(value):
                raise LorakitError(f"{name}: the mix does not fit into {str(value.dtype).removeprefix('torch.')} (infinity or NaN); mend: smaller weights")
            if not torch.equal(value, there[name].read()):
                there[name].write(value)
                done.changed.append(name)
        if not done.changed:
            done.notes.append(f"nothing differs from {frame.folder}")
        write_json(tmp / MIX, done.to_dict())
    return done
