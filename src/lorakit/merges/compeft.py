"""ComPEFT: an adapter in few bits. Yadav et al., 2023, arXiv 2311.13171.

    τ' = α σ(τ) · sgn(τ) ⊙ [|τ| among the largest int(density · d)],   τ all of the adapter's d numbers, σ their standard deviation

On disk: the gaps between the numbers that stay, Golomb-Rice coded, a sign bit for each, one float. A gap g = q 2^b + r is q ones and a zero
in one stream, r in b bits in another;  b = max(0, 1 + ⌊log2(ln(φ-1) / ln(1-density))⌋), φ the golden ratio: about
b + 1/(1 - (1-density)^(2^b)) bits for each number that stays, and its sign.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.formats import peft
from lorakit.formats.base import tensors_of
from lorakit.formats.files import new_file, new_folder, write_json
from lorakit.formats.folder import Folder
from lorakit.merges.base import share
from lorakit.merges.select import kth_largest

STREAMS = ("quotients", "remainders", "signs")
TOLD = "compeft"  # under this key, as JSON: shapes, density, value, how many stay, the adapter's configuration


@dataclass(frozen=True)
class Compressed:
    """What `compress` wrote. bits: of the three streams, for each number of the adapter; error: |τ' - τ| / |τ|."""

    path: str
    numbers: int
    kept: int
    bits: float
    error: float


def width(density: float) -> int:
    """b: how many bits of a gap are kept as they are."""
    return 0 if density >= 1 else max(0, 1 + math.floor(math.log2(math.log((math.sqrt(5) - 1) / 2) / math.log(1 - density))))


def encode(t: Tensor, density: float) -> dict[str, Tensor]:
    """The streams of a tensor whose numbers are 0 or ± one value, as bytes."""
    at, b = t.nonzero().squeeze(1).numpy(), width(density)
    gaps = np.diff(at, prepend=-1) - 1
    ends = np.cumsum((gaps >> b) + 1) - 1  # where a gap's ones end
    ones = np.ones(int(ends[-1]) + 1 if len(ends) else 0, dtype=np.uint8)
    ones[ends] = 0
    rest = ((gaps[:, None] >> np.arange(b)) & 1).astype(np.uint8).reshape(-1)
    streams = ones, rest, (t[at] > 0).numpy().astype(np.uint8)
    return {k: torch.from_numpy(np.packbits(s)) for k, s in zip(STREAMS, streams, strict=True)}


def decode(streams: Mapping[str, Tensor], d: int, kept: int, density: float, value: float) -> Tensor:
    """The tensor of d numbers again, exactly. LorakitError where the streams do not hold what is said."""
    b = width(density)
    ones, rest, signs = (np.unpackbits(streams[k].numpy()) for k in STREAMS)
    ends = np.flatnonzero(ones == 0)[:kept]
    if len(ends) < kept or len(rest) < kept * b or len(signs) < kept:
        raise LorakitError(f"the streams hold {len(ends)} positions, not {kept}")
    gaps = (np.diff(ends, prepend=-1) - 1 << b) + (rest[: kept * b].reshape(kept, b).astype(np.int64) << np.arange(b)).sum(1)
    at = np.cumsum(gaps + 1) - 1
    if kept and at[-1] >= d:
        raise LorakitError(f"the streams lead to position {at[-1]} of {d}")
    out = torch.zeros(d)
    out[torch.from_numpy(at)] = torch.from_numpy(signs[:kept].astype(np.float32) * 2 - 1) * value
    return out


@torch.no_grad()
def compress(adapter: str | Path, output: str | Path, density: float = 0.2, scale: float = 1.0) -> Compressed:
    """Writes a saved adapter as one small file; `expand` makes a folder of it again. The file appears whole or not at all."""
    share("compeft: density", density)
    folder, output = Folder(adapter), Path(output)
    if output.exists():
        raise LorakitError(f"{output} is there already; mend: another name, or take it away first")
    shapes = {k: list(t.shape) for k, t in folder.tensors.items()}
    flat = torch.cat([t.float().reshape(-1) for t in folder.tensors.values()])
    if not torch.isfinite(flat).all():
        raise LorakitError(f"{adapter}: a tensor holds NaN or infinity")
    value = float(torch.tensor(scale * float(flat.std())))
    small = flat.sign() * value * (flat.abs() >= kth_largest(flat, int(density * flat.numel())))
    streams, kept = encode(small, density), int((small != 0).sum())
    if not kept:
        raise LorakitError(f"compeft: nothing of {flat.numel()} numbers stays; mend: a larger density")
    told: dict[str, Any] = {"shapes": shapes, "density": density, "value": value, "kept": kept, "config": folder.config,
                            "files": (folder.receipt or {}).get("files")}
    with new_file(output) as tmp:
        save_file(streams | {TOLD: torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)}, str(tmp), metadata={"format": "pt"})
        if not torch.equal(decode(tensors_of(tmp), flat.numel(), kept, density, value), small):
            raise LorakitError(f"{output}: read back, it is not what was written")
    bits = 8 * sum(s.numel() for s in streams.values()) / flat.numel()
    return Compressed(str(output), flat.numel(), kept, bits, float((small - flat).norm() / flat.norm()))


def expand(file: str | Path, output: str | Path) -> Path:
    """Writes a compressed adapter as a PEFT folder. It has no receipt: it is not what was trained."""
    file, output = Path(file), Path(output)
    if output.exists():
        raise LorakitError(f"{output} is there already; mend: another name, or take it away first")
    if not file.is_file():
        raise LorakitError(f"there is no file {file}")
    streams = tensors_of(file)
    if set(streams) != {*STREAMS, TOLD}:
        raise LorakitError(f"{file} is no compressed adapter")
    told = json.loads(streams[TOLD].numpy().tobytes())
    sizes = [math.prod(s) for s in told["shapes"].values()]
    try:
        flat = decode(streams, sum(sizes), told["kept"], told["density"], told["value"])
    except LorakitError as e:
        raise LorakitError(f"{file} is damaged: {e}") from None
    tensors = {k: t.reshape(s).clone() for (k, s), t in zip(told["shapes"].items(), flat.split(sizes), strict=True)}
    with new_folder(output) as tmp:
        save_file(peft.written(told["config"], tensors), str(tmp / peft.TENSORS), metadata={"format": "pt"})
        write_json(tmp / peft.CONFIG, told["config"])
    return output
