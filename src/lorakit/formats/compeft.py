"""ComPEFT: an adapter in few bits, as one file. Yadav et al., 2023, arXiv 2311.13171.

    τ' = α σ(τ) · sgn(τ) ⊙ [|τ| among the largest int(density · d)],   τ all d numbers of all factors A and B, σ their standard deviation

On disk: the gaps between the numbers that stay, Golomb-Rice coded, a sign bit for each, one float. A gap g = q 2^b + r is q ones and a zero
in one stream, r in b bits in another;  b = max(0, 1 + ⌊log2(ln(φ-1) / ln(1-k/d))⌋), φ the golden ratio, k of the d numbers stay: about
b + 1/(1 - (1-k/d)^(2^b)) bits for each number that stays, and its sign. A DoRA's magnitudes are kept as they are.
The paper looks for density (0.05 … 0.5) and α (0.5 … 10) on held-out data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.formats import peft
from lorakit.formats.base import Format, lora_of, tensors_of, titled
from lorakit.formats.folder import Folder, Part
from lorakit.formats.vllm import KEPT
from lorakit.method import Method, method_from_dict

STREAMS = ("quotients", "remainders", "signs")
TOLD = "compeft"  # under this key, as JSON: shapes, value, how many stay, methods, the base's name
LEAVES = ("A", "B")


def width(share: float) -> int:
    """b: how many bits of a gap are kept as they are, where this share of the numbers stays."""
    return 0 if share >= 1 else max(0, 1 + math.floor(math.log2(math.log((math.sqrt(5) - 1) / 2) / math.log(1 - share))))


def encode(t: Tensor) -> dict[str, Tensor]:
    """The streams of a tensor (d) whose numbers are 0 or ± one value, as bytes."""
    at = t.nonzero().squeeze(1).numpy()
    b = width(len(at) / len(t))
    gaps = np.diff(at, prepend=-1) - 1
    ends = np.cumsum((gaps >> b) + 1) - 1  # where a gap's ones end
    ones = np.ones(int(ends[-1]) + 1 if len(ends) else 0, dtype=np.uint8)
    ones[ends] = 0
    rest = ((gaps[:, None] >> np.arange(b)) & 1).astype(np.uint8).reshape(-1)
    streams = ones, rest, (t[at] > 0).numpy().astype(np.uint8)
    return {k: torch.from_numpy(np.packbits(s)) for k, s in zip(STREAMS, streams, strict=True)}


def decode(streams: Mapping[str, Tensor], d: int, kept: int, value: float) -> Tensor:
    """The tensor of d numbers again, exactly. LorakitError where the streams do not hold what is said."""
    b = width(kept / d)
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


def _flat(parts: Mapping[str, Part]) -> tuple[Tensor, dict[tuple[str, str], torch.Size]]:
    """All factors as one vector, and (target, leaf) -> shape in its order."""
    shapes = {(p, k): part.leaves[k].shape for p, part in parts.items() for k in LEAVES}
    return torch.cat([parts[p].leaves[k].float().reshape(-1) for p, k in shapes]), shapes


def _with(parts: Mapping[str, Part], flat: Tensor, shapes: Mapping[tuple[str, str], torch.Size]) -> dict[str, Part]:
    new = dict(parts)
    for ((p, k), shape), t in zip(shapes.items(), flat.split([math.prod(s) for s in shapes.values()]), strict=True):
        new[p] = replace(new[p], leaves=dict(new[p].leaves) | {k: t.reshape(shape).clone()})
    return new


class ComPEFT(Format):
    name = "compeft"
    looks_for = "a .compeft file of sign streams"
    suffix = ".compeft"
    rounds = True
    options = ("density", "scale")

    def found(self, path):
        return path.is_file() and path.suffix == self.suffix and TOLD in tensors_of(path, keys=True)

    def unfit(self, part):
        return None if lora_of(part.method) else f"{titled(part.method)} is more than a plain LoRA or DoRA"

    def kept(self, source, density=0.2, scale=1.0):
        if not 0 < density <= 1 or not scale > 0:
            raise LorakitError(f"compeft: density must be above 0 and at most 1, and scale above 0, not {density} and {scale}")
        parts = source.parts()
        flat, shapes = _flat(parts)
        keep = int(density * flat.numel())
        if not keep or not flat.any():
            raise LorakitError(f"compeft: nothing of {flat.numel()} numbers stays; mend: a larger density, of an adapter that is not zero")
        size = flat.abs()
        small = flat.sign() * float(scale * flat.std()) * (size >= size.kthvalue(flat.numel() - keep + 1).values)
        return Folder.held(source.path, _with(parts, small, shapes), **{k: source.config[k] for k in KEPT if k in source.config})

    def write(self, source, out, model, **options: Any):
        parts = source.parts()
        flat, shapes = _flat(parts)
        stay, streams = int(flat.count_nonzero()), encode(flat)
        beside = {p: replace(part, leaves={k: t.contiguous() for k, t in part.leaves.items() if (p, k) not in shapes}) for p, part in parts.items()}
        rest = {f: t for p, part in beside.items() for f, t in part.keyed(p).items()}
        told = {"shapes": [[p, k, list(s)] for (p, k), s in shapes.items()], "value": float(flat.abs().max()), "kept": stay,
                "modules": {p: part.method.to_dict() for p, part in parts.items()}, "lookup": [p for p, part in parts.items() if part.lookup],
                "config": {k: source.config[k] for k in KEPT if k in source.config}}
        save_file(rest | streams | {TOLD: torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)}, str(out), metadata={"format": "pt"})
        size = sum(t.numel() for t in streams.values())
        return [f"{_stay(stay, len(flat))}, in {size:,} bytes, {8 * size / len(flat):.2f} bits a number: {2 * len(flat) / size:.3g} times less than 16 each"]

    def read(self, path, model):
        tensors = tensors_of(path)
        if not {*STREAMS, TOLD} <= tensors.keys():
            raise LorakitError(f"{path} is no compressed adapter")
        try:
            told = json.loads(tensors[TOLD].numpy().tobytes())
            shapes = {(p, k): torch.Size(s) for p, k, s in told["shapes"]}
            d = sum(math.prod(s) for s in shapes.values())
            parts = {p: _beside(p, method_from_dict(m), p in told["lookup"], tensors) for p, m in told["modules"].items()}
            parts = _with(parts, decode(tensors, d, told["kept"], told["value"]), shapes)
        except (LorakitError, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as e:
            raise LorakitError(f"{path} is damaged: {e}") from None
        return Folder.held(path, parts, (f"ComPEFT: {_stay(told['kept'], d)}, each ± {told['value']:.4g}",), **told["config"])


def _beside(path: str, method: Method, lookup: bool, tensors: Mapping[str, Tensor]) -> Part:
    """A target with what the file has of it beside the streams."""
    keys = {k: f"{peft.PREFIX}{path}.{method.key(k, lookup)}" for k in method.leaves}
    return Part(method, {k: tensors[f] for k, f in keys.items() if f in tensors}, lookup)


def _stay(kept: int, d: int) -> str:
    return f"{kept:,} of {d:,} numbers stay ({kept / d:.2%})"
