"""From one file format to another: read, made to fit, written under a temporary name, read again, compared, and only then there."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import host
from lorakit.errors import LorakitError, near
from lorakit.formats import compeft, gguf, kohya, mlx, peft_folder, vllm  # noqa: F401 (each registers itself)
from lorakit.formats.base import Format, detect, find, lora_of
from lorakit.formats.files import new_file, new_folder, read_json, sha256, write_json
from lorakit.formats.folder import Export, Folder, Part, beside
from lorakit.formats.peft import PREFIX, RECEIPT
from lorakit.formats.peft_folder import skeleton
from lorakit.formats.receipt import probe, tolerance, versions
from lorakit.kernels.svd import lower_rank
from lorakit.method import Additive, Wrapper
from lorakit.methods.lora import LoRA
from lorakit.sites import place

DIFFERENT = 1e-5  # a relative difference of updates above which a written file is not the one that was meant


@dataclass
class Conversion:
    """What `convert` did. error: the largest relative difference between the update of a target that was to be written and the one read back."""

    source: str
    output: str
    read_as: str
    written_as: str
    targets: int
    notes: list[str] = field(default_factory=list)
    error: float = 0.0
    where: str = ""
    by_logits: int = 0  # targets that are kept in another way in the two, so that logits alone compare them
    on_base: bool = False  # a base was at hand
    logits: float | None = None  # largest difference of the logits on it, of a model whose inputs are known
    moved: float | None = None  # how far the adapter moves them
    left_out: Mapping[str, Any] | None = None  # of the update, where a method became the nearest LoRA of a rank
    rounded: Mapping[str, Any] | None = None  # how far what the format holds is from the update, as a part of it: overall, and by target
    rounded_logits: float | None = None  # largest difference of the logits that makes
    bytes: int = 0  # of what was written

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.read_as}) -> {self.output} ({self.written_as}), {self.targets} targets", *(f"  {n}" for n in self.notes)]
        if self.left_out:
            lines.append(f"  made plain LoRA: {self.left_out['overall']:.2%} of the update's norm left out")
        if self.rounded:
            moved = "" if self.rounded_logits is None else f"; logits on the base differ by {self.rounded_logits:.3g}"
            lines.append(f"  {self.written_as} rounds: it is {self.rounded['overall']:.2%} of the update's norm away from the adapter{moved}")
        said = f"no update differs by more than {self.error:.1e} of its norm ({self.where})" if self.where else "equal to the bit"
        said += f" ({self.by_logits} of {self.targets} targets by the logits alone)" if self.by_logits else ""
        lines.append(f"  read back: {said}{'' if self.on_base else '; logits not compared, for no base was given (base, --base)'}")
        if self.logits is not None:
            lines.append(f"  on the base: logits equal {f'to {self.logits:.1e}' if self.logits else 'to the bit'}; the adapter moves them by {self.moved:.3g}")
        return "\n".join(lines)


@torch.no_grad()
def convert(src: str | Path, dst: str | Path, to: str, base: Callable[[bool], nn.Module | None], *, rank: int | None = None, check_base: bool = True,
            **options: Any) -> Conversion:
    """Writes the adapter at `src`, in whatever format, to `dst` in the format `to`; all of it appears, checked, or nothing.

    base: called with whether it is needed, gives the base model or None. rank: turns every target into a plain LoRA of at most this rank.
    """
    src, dst, target = Path(src), Path(dst), find(to)
    for k in options:
        if k not in target.options:
            raise LorakitError(f"convert: {to} has no option `{k}`{near(k, target.options)}")
    _check_place(dst, target)
    found = detect(src)
    model = base(found.reads_with_base or target.writes_with_base or rank is not None)
    if model is None and target.writes_with_base:
        raise LorakitError(f"{to} can be written only beside the base, whose names and sizes it needs; mend: give base")
    source = found.read(src, model)
    _check_finite(source)
    done = Conversion(str(src), str(dst), found.name, to, len(source.methods), list(source.notes))
    if never := _never(source, target, model):
        raise LorakitError(f"{target.name} cannot hold {never}; mend: keep the PEFT folder, or merge the adapter")
    if rank is not None or (why := _unfit(source, target)):
        model = model or _base_to_turn(base, f"{target.name} cannot hold {why}" if rank is None else f"rank={rank}")
        source = _as_lora(source, target, model, rank, check_base, done)
    done.on_base = model is not None
    if (source.receipt or {}).get("lineage"):
        done.notes.append("it was trained over earlier adapters, which this holds no part of: see the lineage in the source's receipt")
    held = target.kept(source, **options)
    if held is not source:
        _rounding(source, held, model, check_base, done)
    with new_file(dst) if target.suffix else new_folder(dst) as tmp:
        done.notes += target.write(held, tmp, model, **options)
        done.bytes = sum(f.stat().st_size for f in ([tmp] if tmp.is_file() else tmp.iterdir()))
        again = target.read(tmp, model if model is not None else skeleton(held.parts()))
        _compare(held, again, model, check_base, done)
        if not target.suffix:
            _receipt(tmp, src, done)
    return done


def _check_place(dst: Path, target: Format) -> None:
    if dst.exists() and not (dst.is_dir() and not target.suffix and not any(dst.iterdir())):
        raise LorakitError(f"{dst} is there already; mend: another name, or take it away first")
    if dst.suffix != target.suffix and (target.suffix or dst.suffix in (".safetensors", ".gguf")):
        raise LorakitError(f"{target.name} is written as a {f'{target.suffix} file' if target.suffix else 'folder'}, and {dst} is none; mend: "
                           f"{dst.with_suffix(target.suffix)}")


def _check_finite(source: Folder) -> None:
    for k, t in source.tensors.items():
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise LorakitError(f"{source.path}: `{k}` holds NaN or infinity")


def _base_to_turn(base: Callable[[bool], nn.Module | None], what: str) -> nn.Module:
    try:
        model = base(True)
    except LorakitError as e:
        raise LorakitError(f"{what}, and to turn the adapter into plain LoRA its base is needed: {e}") from None
    if model is None:
        raise LorakitError(f"{what}, and to turn the adapter into plain LoRA its base is needed; mend: give base")
    return model


def _as_lora(source: Folder, target: Format, model: nn.Module, rank: int | None, check_base: bool, done: Conversion) -> Folder:
    """The plain LoRA that an adapter amounts to, or the nearest of a rank. LorakitError that names what cannot be one."""
    why = _unfit(source, target)
    with beside(model, source, check_base) as name:
        try:
            export = Export(model, name, "lora", rank, otherwise="keep the PEFT folder")
        except LorakitError as e:
            raise LorakitError(f"{target.name} cannot hold {why}, and as a plain LoRA: {e}" if why else str(e)) from None
        tables = {p for p, slot in host.slots(model, name).items() if slot.site.lookup}
    parts = {}
    for p, m in export.methods.items():
        keys = {k: f"{PREFIX}{p}.{m.key(k, p in tables)}" for k in m.leaves}
        if any(f not in export.tensors for f in keys.values()):
            raise LorakitError(f"{source.path}: {p} ({m.card.title}) cannot be turned into a plain LoRA, as {target.name if why else 'rank'} needs it; mend: "
                               "lorakit merge, or, for a PEFT folder of lower rank, lorakit shrink")
        parts[p] = Part(m, {k: export.tensors[f] for k, f in keys.items()}, p in tables)
    if export.converted:
        done.notes.append(f"{len(export.converted)} of {len(parts)} targets turned into plain LoRA")
    done.left_out = export.relative_error
    kept = {k: v for k, v in source.config.items() if k in vllm.KEPT or k == "ensure_weight_tying"}
    made = Folder.held(source.path, parts, **kept)
    if why := _unfit(made, target):
        raise LorakitError(f"{target.name} cannot hold {why}; mend: keep the PEFT folder, or merge the adapter")
    return made


def _never(source: Folder, target: Format, model: nn.Module | None) -> str | None:
    """What of an adapter a format cannot hold in any form: ties, and parameters that are no layer's."""
    if source.config.get("ensure_weight_tying") and not target.ties:
        return "a head that follows the adapter of its tied embedding (ensure_weight_tying)"
    modules = {} if model is None else dict(host.walk(model))
    raw = [p for p in source.methods if (at := place(modules, p)) is not None and at.key]
    if (raw or source.config.get("target_parameters")) and not target.parameters:
        return f"{', '.join(raw or source.config['target_parameters'])}: parameters that are read, not called"
    return None


def _unfit(source: Folder, target: Format) -> str | None:
    """The first target whose adapter a format cannot hold as it is, and why."""
    return next((f"{p or 'the model'}: {why}" for p, part in source.parts().items() if (why := target.unfit(part))), None)


def difference(a: Part, b: Part) -> float:
    """By how much of its norm the update of one adapter of a target differs from that of another, or a magnitude does; the larger."""
    (ma, pa), (mb, pb) = ((x.method, {k: _flat(t, x.method.leaves[k].axes) for k, t in x.leaves.items()}) for x in (a, b))
    out = [0.0]
    while isinstance(ma, Wrapper) and isinstance(mb, type(ma)):
        out += [_relative(float((pa[k] - pb[k]).norm()), float(pa[k].norm())) for k in ma.own]
        ma, mb = ma.inner, mb.inner
    if type(ma) is LoRA and type(mb) is LoRA and "d" not in pa:
        out.append(_relative(*_norms(ma.two(pa), mb.two(pb))))
    elif isinstance(ma, Additive) and not ma.reads_base and type(ma) is type(mb):
        da, db = (m.delta(p, None) for m, p in ((ma, pa), (mb, pb)))
        out.append(_relative(float((da - db).norm()), float(da.norm())))
    else:
        out += [_relative(float((t - pb[k]).norm()), float(t.norm())) for k, t in pa.items()]
    return max(out)


def _norms(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """|B A - B' A'| and |B A|, from the factors."""
    return lower_rank(torch.cat([a[0], -b[0]], 1), torch.cat([a[1], b[1]]), 1)[3], lower_rank(*a, 1)[3]


def _flat(t: Tensor, axes: str) -> Tensor:
    """A leaf as its method has it: a convolution's kernel in one with the inputs."""
    return t.double().flatten(len(axes.split()) - 1)


def _relative(gap: float, size: float) -> float:
    return gap / size if size else gap


def _rounding(source: Folder, held: Folder, model: nn.Module | None, check_base: bool, done: Conversion) -> None:
    """Fills in how far what a format holds is from the adapter: its updates, of a DoRA those inside, and the logits."""
    meant, kept, gaps = source.parts(), held.parts(), {}
    for p, part in meant.items():
        if (core := lora_of(part.method)) is not None:
            a, b = ({k: _flat(x.leaves[k], core.leaves[k].axes) for k in core.leaves} for x in (part, kept[p]))
            gaps[p] = _norms(core.two(a), core.two(b))
    gap, size = (sum(g[n] ** 2 for g in gaps.values()) ** 0.5 for n in (0, 1))
    done.rounded = {"overall": _relative(gap, size), "modules": {p: _relative(*g) for p, g in gaps.items()}}
    if model is not None:
        logits = [_logits(model, f, check_base and f is source) for f in (source, held)]
        done.rounded_logits = None if logits[0] is None else float((logits[0] - logits[1]).abs().max())


def _logits(model: nn.Module, folder: Folder | None, check_base: bool) -> Tensor | None:
    """Of the base with one adapter, or with none."""
    with ExitStack() as on:
        if folder is not None:
            on.enter_context(beside(model, folder, check_base))
        elif (state := host.find_state(model)) is not None:
            keep, state.active = state.active, {}
            on.callback(setattr, state, "active", keep)
        return probe(model)


def _compare(source: Folder, again: Folder, model: nn.Module | None, check_base: bool, done: Conversion) -> None:
    """Fills in how far the file read back is from what was meant. LorakitError where that is another adapter."""
    meant, read = source.parts(), again.parts()
    if meant.keys() != read.keys():
        lost = sorted(meant.keys() ^ read.keys())
        raise LorakitError(f"{done.output}: read back, `{lost[0]}` is {'missing' if lost[0] in meant else 'there, too'}; this is a defect of lorakit")
    for p, part in meant.items():
        if not part.leaves or part.leaves.keys() != read[p].leaves.keys():
            done.by_logits += 1
            continue
        same = part.method == read[p].method and all(torch.equal(t, read[p].leaves[k]) for k, t in part.leaves.items())
        if not same and (error := difference(part, read[p])) > done.error:
            done.error, done.where = error, p
    if done.error > DIFFERENT:
        raise LorakitError(f"{done.output}: read back, the update of {done.where} differs by {done.error:.2g}; this is a defect of lorakit")
    if model is None:
        return
    logits = [_logits(model, folder, check_base and folder is source) for folder in (None, source, again)]
    if logits[0] is not None:
        done.logits, done.moved = float((logits[1] - logits[2]).abs().max()), float((logits[1] - logits[0]).abs().max())
        if done.logits > tolerance(logits[1], model):
            raise LorakitError(f"{done.output}: read back, its logits differ by {done.logits:.3g}; this is a defect of lorakit")


def _receipt(folder: Path, src: Path, done: Conversion) -> None:
    """Writes where a converted folder came from into its receipt, or a receipt of that alone."""
    path = folder / RECEIPT
    inside = sorted(p for p in src.iterdir() if p.is_file()) if src.is_dir() else [src]
    told = {k: v for k, v in done.to_dict().items() if k not in ("output", "targets")} | {"files": {p.name: sha256(p) for p in inside}}
    if path.is_file():
        write_json(path, read_json(path) | {"converted": told})
    elif not Folder.there(folder):
        files = {p.name: sha256(p) for p in sorted(folder.iterdir())}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(path, {"created": now, "converted": told, "files": files, "versions": versions()})
