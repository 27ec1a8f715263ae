"""What a file format of adapters is: how it is known, how it is read to the house's own form and written from it, what it cannot hold.

The house's own form is a `Folder`: for every target a method, and its tensors in the layout of PEFT's files. A format in a
file of its own makes one from what it finds on disk (`Folder.held`) and writes one (`Folder.parts`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorakit import host
from lorakit.errors import LorakitError, near
from lorakit.formats.folder import Folder, Part
from lorakit.method import Method, Wrapper
from lorakit.methods.lora import LoRA
from lorakit.methods.magnitude import Magnitude

FORMATS: dict[str, Format] = {}


class Format(ABC):
    """One way of writing an adapter down. A subclass registers itself under its `name`."""

    name: ClassVar[str]
    looks_for: ClassVar[str]  # what it is known by, for messages
    suffix: ClassVar[str] = ""  # of its file; "": it is a folder
    reads_with_base: ClassVar[bool] = False  # names or sizes of the base are needed to read it
    writes_with_base: ClassVar[bool] = False
    ties: ClassVar[bool] = False  # it can say that a head follows the embedding's adapter
    parameters: ClassVar[bool] = False  # it can hold adapters of parameters that are read, not called
    rounds: ClassVar[bool] = False  # it holds less than the adapter: `kept` says what
    options: ClassVar[tuple[str, ...]] = ()  # what `kept` and `write` can be told beside

    def __init_subclass__(cls) -> None:
        FORMATS[cls.name] = cls()

    @abstractmethod
    def found(self, path: Path) -> bool:
        """Whether this is what lies at the path."""
        ...

    @abstractmethod
    def read(self, path: Path, model: nn.Module | None) -> Folder:
        """What lies there, in the house's own form. LorakitError where it is damaged, or says what the house cannot hold."""
        ...

    @abstractmethod
    def unfit(self, part: Part) -> str | None:
        """Why this format cannot hold one target's adapter; None where it can."""
        ...

    def kept(self, source: Folder, **options: Any) -> Folder:
        """What of an adapter this format holds: the adapter that `write` gets, and that is read back."""
        return source

    @abstractmethod
    def write(self, source: Folder, out: Path, model: nn.Module | None, **options: Any) -> list[str]:
        """Writes the adapter to `out`, which is not there yet (a folder is, and is empty); says what had to be folded."""
        ...


def find(name: str) -> Format:
    """The format of this name. LorakitError with the nearest one otherwise."""
    if name not in FORMATS:
        raise LorakitError(f"unknown format `{name}`{near(name, FORMATS)}")
    return FORMATS[name]


def detect(path: Path) -> Format:
    """The format of what lies at a path. LorakitError that says what was looked for, where it is none."""
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise LorakitError(f"there is no {path}{near(path.name, beside, listing=False)}")
    if known := next((f for f in FORMATS.values() if f.found(path)), None):
        return known
    held = f"the folder holds {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'}" if path.is_dir() else f"it has {path.stat().st_size} bytes"
    raise LorakitError(f"{path} is no adapter in a known format: {'; '.join(f'{f.name} is {f.looks_for}' for f in FORMATS.values() if f.looks_for)}; {held}"
                       + next((f"; mend: name its folder, which is {f.name}" for f in FORMATS.values() if path.is_file() and f.found(path.parent)), ""))


def opened(path: str | Path, model: nn.Module) -> Folder:
    """A saved adapter in whatever format, in the house's own form, its paths those of this model."""
    path = Path(path)
    if path.is_file():
        return detect(path).read(path, model)
    known = next((f for f in FORMATS.values() if f.found(path)), None)
    return known.read(path, model) if known else Folder(path)


def tensors_of(path: Path, keys: bool = False) -> dict[str, Any]:
    """The tensors of a safetensors file by key; with `keys`, the keys alone. LorakitError where it is not one."""
    try:
        with safe_open(path, "pt") as f:
            return {k: None if keys else f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, RuntimeError) as e:
        raise LorakitError(f"{path} is truncated or not a safetensors file ({path.stat().st_size} bytes): {e}") from None


def lora_of(method: Method) -> LoRA | None:
    """The plain LoRA, without a bias of its own, that a method is, or that a DoRA has inside."""
    inner = method.inner if isinstance(method, Magnitude) else method
    return inner if type(inner) is LoRA and not inner.lora_bias else None


def titled(method: Method) -> str:
    """A method's title, and of a wrapper what it goes around."""
    return f"{method.card.title} around {titled(method.inner)}" if isinstance(method, Wrapper) else method.card.title


def not_lora(part: Part, magnitude: bool = False, lookup: bool = True, slides: bool = False) -> str | None:
    """Why a target's adapter is not a plain LoRA (`magnitude`: nor a DoRA) of a linear layer, or of what else is allowed."""
    core = lora_of(part.method)
    if core is None or (isinstance(part.method, Magnitude) and not magnitude):
        return f"{titled(part.method)} is more than a plain LoRA{' or DoRA' if magnitude else ''}"
    if part.lookup and (not lookup or isinstance(part.method, Magnitude)):
        return "it adapts an embedding" + (", with a magnitude" if lookup else "")
    A, B = part.leaves.get("A"), part.leaves.get("B")
    if A is None or B is None or A.shape[0] != core.r or B.shape[1] != core.r:
        return "it adapts a parameter that is read, not called (fused experts, an attention's projection)"
    return "it adapts a convolution" if A.dim() > 2 and not slides else None


def lora_part(where: str, A: Tensor, B: Tensor, alpha: float, lookup: bool = False, m: Tensor | None = None) -> Part:
    """A LoRA read from a file, A (r, i, …) and B (o, r, …), of scale alpha / r; with a magnitude m (o), a DoRA."""
    if A.dim() < 2 or B.dim() < 2 or A.shape[0] != B.shape[1]:
        raise LorakitError(f"{where}: the two factors do not fit: first {list(A.shape)}, second {list(B.shape)}; they should be (r, inputs) and (outputs, r)")
    method: Method = LoRA(A.shape[0], float(alpha))
    return Part(method if m is None else Magnitude(method), {"A": A, "B": B} | ({} if m is None else {"m": m}), lookup)


def times(part: Part, leaf: str, by: float) -> Part:
    """A target's adapter with one leaf multiplied by a number; all its leaves then have at least 32 bits, so that little is rounded away."""
    if by == 1:
        return part
    leaves = {k: t.to(torch.promote_types(t.dtype, torch.float32)) for k, t in part.leaves.items()}
    return replace(part, leaves=leaves | {leaf: leaves[leaf] * by})


def one_scale(parts: Mapping[str, Part], rank: bool) -> tuple[dict[str, Part], float, list[str]]:
    """The same LoRAs with one factor s of all of them, the rest folded into B, and with `rank` of one rank, the lower ones padded with zeros.

        s_t B_t A_t = s (s_t / s) B_t A_t = s [(s_t / s) B_t, 0] [A_t; 0]

    Exact but for the rounding of one product. s is the one that most targets have. Also says what was done.
    """
    cores = {p: lora_of(part.method) for p, part in parts.items()}
    most = Counter(c.s for c in cores.values() if c.s).most_common(1)
    s, notes, out = most[0][0] if most else 1.0, [], {}
    top = max(c.r for c in cores.values())
    for path, part in parts.items():
        core, part = cores[path], times(part, "B", cores[path].s / s)
        A, B = part.leaves["A"], part.leaves["B"]
        r = top if rank else core.r
        if core.r < r:
            A = torch.cat([A, A.new_zeros(r - core.r, *A.shape[1:])])
            B = torch.cat([B, B.new_zeros(B.shape[0], r - core.r, *B.shape[2:])], 1)
        method = part.method.having(r=r, alpha=s * r, scaling="standard")
        out[path] = replace(part, method=method, leaves=dict(part.leaves) | {"A": A, "B": B})
    if other := sum(c.s != s for c in cores.values()):
        notes.append(f"{other} of {len(parts)} targets have a scale other than {s:.6g}: folded into their second factor")
    if lower := sum(c.r < top for c in cores.values()) if rank else 0:
        notes.append(f"{lower} of {len(parts)} targets have a rank below {top}: padded with zeros")
    return out, s, notes


def rank_stabilised(parts: Mapping[str, Part]) -> list[str]:
    """A note where a scale is not alpha / r, as it is then in the file."""
    many = sum(c.s != c.alpha / c.r for part in parts.values() if (c := lora_of(part.method)))
    return [f"{many} of {len(parts)} targets have the scale alpha/sqrt(r) (rsLoRA): said as an alpha/r of the same value"] if many else []


def names_of(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of everything inside a model but what adapters put there."""
    return {n: m for n, m in host.walk(model) if n}
