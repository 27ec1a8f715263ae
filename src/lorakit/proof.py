"""Proof that an adapter is in effect: everything its receipt says, recomputed from what is on disk.

    verify(folder, base)                  files, base fingerprint, key coverage, size of every update, logits
    verify(folder, base, merged=path)     and that a merged model is base + adapter, not the base again
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import host
from lorakit.errors import LorakitError
from lorakit.formats import lineage, peft
from lorakit.formats.folder import Folder, load
from lorakit.formats.receipt import compare_bases, dtype_of, fingerprint, modules_table, probe, tolerance
from lorakit.models import load_base, task_of
from lorakit.sites import place, site_at


@dataclass(frozen=True)
class Point:
    """One thing that was checked; `ok` is None where it could not be."""

    name: str
    ok: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{ {True: 'PASS', False: 'FAIL', None: 'n/a '}[self.ok]}  {self.name}: {self.detail}"


@dataclass
class Report:
    points: list[Point] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(p.ok is not False for p in self.points)

    def add(self, name: str, ok: bool | None, detail: str) -> bool | None:
        self.points.append(Point(name, ok, detail))
        return ok

    def raise_if_failed(self) -> None:
        if not self.ok:
            raise LorakitError("; ".join(f"{p.name}: {p.detail}" for p in self.points if p.ok is False))

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "points": [vars(p) for p in self.points]}

    def __str__(self) -> str:
        unsure = sum(p.ok is None for p in self.points)
        tail = f" ({unsure} point{'s' * (unsure > 1)} could not be checked)" if unsure and self.ok else ""
        return "\n".join([*map(str, self.points), ("PASS" if self.ok else "FAIL") + tail])


def verify(path: str | Path, base: str | Path | nn.Module | None = None, merged: str | Path | nn.Module | None = None) -> Report:
    """Checks a saved adapter against its base, and a merged model against both. Never raises for a failed point.

    base: a model (left as it was found) or where to load it from; by default what the adapter's config names.
    """
    out = Report()
    try:
        folder = Folder(path)
    except LorakitError as e:
        out.add("files", False, str(e))
        return out
    _files(out, folder)
    try:
        model = base if isinstance(base, nn.Module) else load_base_for(folder, base)
    except LorakitError as e:
        out.add("base", False, str(e))
        return out
    name = "verify_"
    _fingerprint(out, folder, model)
    try:
        state = host.find_state(model)
        before = state.active if state else {}
        load(model, folder, name, check_base=False)
    except LorakitError as e:
        out.add("keys", False, str(e))
        return out
    try:
        kept = f"{len(folder.tensors)} of {len(folder.tensors)} tensors found their place in {len(folder.methods)} modules"
        out.add("keys", True, kept)
        if _effect(out, folder, model, name):
            _probe(out, folder, model, name)
        if merged is not None:
            _merged(out, folder, model, name, merged)
    finally:
        host.delete(model, name)
        if before:
            host.state_of(model).active = before
    return out


def load_base_for(folder: Folder, base: str | Path | None = None, dtype: str | None = None, **options: Any) -> nn.Module:
    """The base a saved adapter was trained on: the right task and number of classes, its dtype, earlier adapters merged in."""
    told = base if base is not None else folder.config.get("base_model_name_or_path")
    if not told:
        raise LorakitError("the adapter does not say which base it belongs to; mend: give --base")
    receipt = folder.receipt or {}
    info = receipt.get("base", {})
    dtype = dtype or dtype_of(info)
    if info.get("packed") and "quantize" not in options:
        options["quantize"] = info["packed"]
    if folder.config.get("task_type") == "SEQ_CLS":
        rows = [folder.tensors[f"{peft.PREFIX}{p}.weight"].shape[0] for p, m in folder.methods.items() if m.replaces]
        options |= {"num_labels": rows[-1]} if rows else {}
    task = task_of(info["class"]) if "class" in info else ("sequence-classification" if "num_labels" in options else "causal-lm")
    model = load_base(told, task, dtype=dtype, **options)
    if any(step["stage"] == "merge" for step in receipt.get("lineage", [])) and lineage.apply(model, receipt["lineage"]):
        host.detach(model)
    return model


def _files(out: Report, folder: Folder) -> None:
    if folder.receipt is None:
        out.add("files", None, f"{len(folder.tensors)} tensors read, but there is no receipt.json (another library wrote this)")
        return
    if changed := folder.changed:
        out.add("files", False, f"{changed} is not the file this receipt was written for: it changed after saving")
        return
    out.add("files", True, f"{len(folder.tensors)} tensors, digests equal the receipt's")


def _fingerprint(out: Report, folder: Folder, model: nn.Module) -> None:
    if folder.receipt is None:
        out.add("base", None, "no receipt, so nothing says which base this adapter was trained on")
        return
    folder.bind(model)
    try:
        now = {n: p for n, p in fingerprint(model).items() if not folder.replaces(n)}
    except LorakitError as e:
        out.add("base", False, str(e))
        return
    diff = compare_bases(folder.receipt["base"]["tensors"], now)
    out.add("base", not diff, "; ".join(diff[:3]) + (f" (and {len(diff) - 3} more)" if len(diff) > 3 else "") if diff
            else f"fingerprint {folder.receipt['base']['digest']} over {len(now)} tensors")


def _effect(out: Report, folder: Folder, model: nn.Module, name: str) -> bool:
    table = modules_table(model, name)
    zero = [p for p, row in table.items() if row["delta_norm"] == 0.0]
    bad = [p for p, row in table.items() if not torch.isfinite(torch.tensor(row["delta_norm"]))]
    if bad:
        out.add("effect", False, f"{bad[0]}: the update is not finite")
    elif len(zero) == len(table):
        out.add("effect", False, f"every one of {len(table)} updates is exactly zero: the adapter does nothing (was it trained?)")
    else:
        some = f"; {len(zero)} of {len(table)} are zero, e.g. {zero[0]}" if zero else ""
        big = max(table.items(), key=lambda kv: kv[1]["delta_norm"] / kv[1]["base_norm"] if kv[1]["base_norm"] else 0.0)
        out.add("effect", True, f"|dW| > 0 in {len(table) - len(zero)} modules, largest share {big[1]['delta_norm'] / max(big[1]['base_norm'], 1e-30):.2%} "
                f"of |W| in {big[0] or 'the model'}{some}")
    for p, row in (folder.receipt or {}).get("modules", {}).items():
        if p in folder.methods and folder.methods[p].replaces:  # a whole copy: its distance to a fresh random head means nothing
            continue
        now = table.get(p, {}).get("delta_norm", 0.0)
        if abs(now - row["delta_norm"]) > 1e-3 * max(row["delta_norm"], 1e-12):
            out.add("norms", False, f"{p}: |dW| is {now:.6g}, it was {row['delta_norm']:.6g} when saved")
            break
    else:
        if folder.receipt:
            out.add("norms", True, "|dW| of every module equals the receipt's")
    return len(zero) < len(table)


def _logits(model: nn.Module, adapter: str | None) -> Tensor | None:
    state = host.state_of(model)
    keep, rows, chained = state.active, state.rows, state.chained
    state.active, state.rows, state.chained = ({adapter: 1.0} if adapter else {}), None, False
    try:
        return probe(model)
    finally:
        state.active, state.rows, state.chained = keep, rows, chained


def _probe(out: Report, folder: Folder, model: nn.Module, name: str) -> None:
    was = (folder.receipt or {}).get("probe")
    now = _logits(model, name)
    if now is None:
        out.add("probe", None, "no probe inputs are known for this kind of model")
        return
    moved = float((now - _logits(model, None)).abs().max())
    if moved == 0.0:
        out.add("probe", False, "logits with the adapter equal the base's exactly: it is not in effect")
        return
    if was is None:
        out.add("probe", True, f"the adapter moves logits by up to {moved:.4g} (no receipt to compare with)")
        return
    same, gap = _same_logits(was, now, folder, model)
    if same:
        out.add("probe", True, f"logits equal those of the save ({'to the bit' if gap == 0 else f'to {gap:.2g}'}); the adapter moves them by up to {moved:.4g}")
    else:
        asbase = torch.tensor(was["base_logits"])
        at = now.reshape(-1)[torch.tensor(was["at"])] if list(now.shape) == was["shape"] else asbase
        like = " and equal what the BASE gave then" if float((at - asbase).abs().max()) <= gap * 1e-3 else ""
        out.add("probe", False, f"logits differ by {gap:.4g} from those of the save{like}")


def _same_logits(was: Mapping[str, Any], now: Tensor, folder: Folder, model: nn.Module) -> tuple[bool, float]:
    if list(now.shape) != was["shape"]:
        return False, float("inf")
    gap = float((now.reshape(-1)[torch.tensor(was["at"])] - torch.tensor(was["logits"])).abs().max())
    dtype = dtype_of(folder.receipt["base"]) or "float32"
    return gap <= tolerance(now, dtype, model), gap


def check_probe(model: nn.Module, name: str, folder: Folder) -> None:
    """For `load(probe=True)`: raises LorakitError unless the logits are those of the day the adapter was saved."""
    out = Report()
    _probe(out, folder, model, name)
    out.raise_if_failed()


@torch.no_grad()
def _merged(out: Report, folder: Folder, model: nn.Module, name: str, merged: str | Path | nn.Module) -> None:
    info = (folder.receipt or {}).get("base", {})
    try:
        other = merged if isinstance(merged, nn.Module) else load_base(merged, task_of(info.get("class", type(model).__name__)))
    except LorakitError as e:
        out.add("merged", False, str(e))
        return
    modules = dict(other.named_modules())
    worst, where, stale, kept = 0.0, "", [], {}
    for path, slot in host.slots(model, name).items():
        if place(modules, path) is None:
            out.add("merged", False, f"the merged model has no module {path}")
            return
        there = site_at(modules, path)
        want, W = slot.map({name: 1.0}).weight(), slot.map({}).weight()
        have = there.view(there.store.read()).to(want.dtype)
        if have.shape != want.shape:
            out.add("merged", False, f"{path}: shape {list(have.shape)}, should be {list(want.shape)}")
            return
        if there.store.packs:
            kept[path] = float(((have - W) * (want - W)).sum() / (want - W).square().sum().clamp_min(1e-30))
            continue
        step = torch.finfo(there.dtype).eps * float(want.norm())
        gap, moved = float((have - want).norm()), float((want - W).norm())
        if moved > 2 * step and float((have - W).norm()) < 0.05 * moved:
            stale.append(path)
        if gap > max(worst, 2 * step):
            worst, where = gap, path
    if stale:
        out.add("merged weights", False, f"{len(stale)} modules still hold the BASE's weight, e.g. {stale[0]}: the merge wrote the base back")
    elif len(kept) < len(host.slots(model, name)):
        out.add("merged weights", not where, f"{where}: differs from base + adapter by {worst:.4g}" if where else "equal base + adapter in every module")
    if kept:
        low = min(kept, key=kept.__getitem__)
        out.add("merged into a quantised base", kept[low] >= 0.9, f"{len(kept)} modules keep {kept[low]:.1%} of the update or more ({low}), by rounding")
    a, b, base = _logits(model, name), probe(other), _logits(model, None)
    if a is None or b is None:
        out.add("merged logits", None, "no probe inputs are known for this kind of model")
        return
    limit = tolerance(a, model, other)
    gap, moved = float((a - b).abs().max()), float((a - base).abs().max())
    hint = "; they equal the BASE's" if float((b - base).abs().max()) < 0.05 * moved else ""
    same = gap <= limit and not hint
    out.add("merged logits", None if kept and not same and gap < moved else same,
            f"differ from base + adapter by {gap:.3g}{hint}, allowed {limit:.3g}; the adapter moves them by {moved:.3g}")


def check_saved(path: str | Path, model: nn.Module) -> None:
    """For `lorakit.save`: verifies what was written beside the model it came from. An adapter that was never trained may be saved."""
    report = verify(path, model)
    report.points = [p for p in report.points if p.name != "effect"]
    report.raise_if_failed()


@torch.no_grad()
def same_function(a: nn.Module, b: nn.Module, what: str) -> None:
    """Two models have the same tensors (ties aside) and the same logits. Raises LorakitError naming what differs."""
    ours, theirs = a.state_dict(), b.state_dict()
    for k, t in ours.items():
        if k in theirs and not torch.equal(t, theirs[k].to(t.dtype)):
            raise LorakitError(f"{what}: `{k}` read back from disk is not what was merged")
        if k not in theirs:
            raise LorakitError(f"{what}: `{k}` is missing on disk")
    x, y = probe(a), probe(b)
    if x is not None and y is not None and float((x - y).abs().max()) > tolerance(x, a, b):
        raise LorakitError(f"{what}: its logits differ by {float((x - y).abs().max()):.3g} from base + adapter")
