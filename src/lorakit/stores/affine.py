"""Whole numbers with a scale and a zero point for every group along the rows: int8, int4, … (round to nearest).

    w ≈ σ (q - z),   q in 0 … 2^b - 1          one (σ, z) for each group of g numbers of a row

σ = (max - min) / (2^b - 1), z = -min/σ with the group's range widened to hold 0; symmetric: σ = max|w| / (2^(b-1) - 1), z = 2^(b-1) for all.
Zero points are floating point, so that what is constant over a group can be added to them exactly (QA-LoRA, 2309.14717).
Bits per weight: b + 64/g, symmetric b + 32/g. `signed` keeps q - 2^(b-1) of 8 bits as it is, which is one conversion away from the number.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.kernels.codes import PLANES, WORDS, look_up, pack, packed_bytes
from lorakit.kernels.fused import Coded
from lorakit.stores.scheme import Scheme, checked, scheme

SIGNED = tuple(float(v) for v in (*range(128), *range(-128, 0)))  # what the bytes of two's complement stand for


@scheme("affine", int8={"bits": 8, "group": 0, "symmetric": True, "signed": True}, int7={"bits": 7}, int6={"bits": 6}, int5={"bits": 5},
        int4={"bits": 4}, int3={"bits": 3, "group": 32}, int2={"bits": 2, "group": 16})
class Affine(Scheme):
    """b-bit whole numbers by groups of a row; group 0: the whole row."""

    bits: int = 4
    group: int = 64
    symmetric: bool = False
    signed: bool = False  # only 8 symmetric bits are

    title = "whole numbers by groups"
    formula = "w ≈ σ (q - z) for every group of a row"

    def __post_init__(self):
        if self.bits not in WORDS:
            raise LorakitError(f"whole numbers: bits must be one of {', '.join(map(str, WORDS))}, not {self.bits!r}")
        if not isinstance(self.group, int) or self.group < 0 or self.group % 8:
            raise LorakitError(f"whole numbers: group must be a multiple of 8, or 0 for a whole row, not {self.group!r}")
        object.__setattr__(self, "signed", self.signed and self.bits == 8 and self.symmetric)

    @property
    def name(self):
        return f"int{self.bits}"

    @property
    def step(self):
        return self.group or 8

    def width(self, m: int) -> int:
        """Numbers in a group of rows of length m."""
        return self.group or m

    def fits(self, n, m):
        super().fits(n, m)
        if m % self.width(m):
            good = [g for g in (128, 64, 32, 16, 8) if m % g == 0]
            raise LorakitError(f"rows of {m} numbers are no whole groups of {self.group}; mend: group: {good[0] if good else 0}")

    def layout(self, n, m):
        k = m // self.width(m)
        out = {"codes": ((packed_bytes(n * m, self.bits),), torch.int8 if self.signed else torch.uint8), "scale": ((n, k), torch.float32)}
        return out if self.symmetric else out | {"zero": ((n, k), torch.float32)}

    def parts(self, M):
        self.fits(*M.shape)
        rows = checked(M, self.name)
        groups = rows.view(len(rows), -1, self.width(rows.shape[1]))
        top = (1 << self.bits) - 1
        if self.symmetric:
            half = 1 << self.bits - 1
            scale = _above_zero(groups.abs().amax(2) / (half - 1))
            q = (groups / scale[..., None]).round().clamp(1 - half, half - 1).view(-1)
            return {"codes": q.to(torch.int8) if self.signed else pack((q + half).to(torch.uint8), self.bits), "scale": scale}
        low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
        scale = _above_zero((high - low) / top)
        zero = -low / scale
        q = (groups / scale[..., None] + zero[..., None]).round().clamp(0, top)
        return {"codes": pack(q.to(torch.uint8).view(-1), self.bits), "scale": scale, "zero": zero}

    def numbers(self, parts, start, stop, shape, dtype):
        shift = 1 << self.bits - 1 if self.symmetric and not self.signed else 0
        if "scale" not in parts:  # by_rows
            return parts["codes"][start:stop].to(dtype)
        if self.bits == 8:  # a code is a byte, so converting it is faster than looking it up
            flat = parts["codes"][start:stop].float()
            flat = flat.sub_(shift) if shift else flat
        else:
            flat = look_up(parts["codes"], tuple(float(v - shift) for v in range(1 << self.bits)), self.bits, start, stop, torch.float32)
        g = self.width(shape[1])
        scale, zero = parts["scale"].view(-1), None if self.symmetric else parts["zero"].view(-1)
        if start % g or stop % g:
            at = torch.arange(start, stop, device=flat.device) // g
            return ((flat if zero is None else flat - zero[at]) * scale[at]).to(dtype)
        flat, span = flat.view(-1, g), slice(start // g, stop // g)
        if zero is not None:
            flat = flat.sub_(zero[span, None])
        return flat.mul_(scale[span, None]).view(-1).to(dtype)

    def by_rows(self, parts, dtype):
        if "scale" not in parts or self.group or not self.signed or dtype not in (torch.float32, torch.bfloat16):
            return None
        return parts["scale"].view(-1), {"codes": parts["codes"]}

    def coded(self, parts, shape):
        if "scale" not in parts:  # by_rows
            return None
        if self.signed:
            return Coded(parts["codes"].view(torch.uint8), 8, SIGNED, parts["scale"].view(-1), 0.0, self.width(shape[1]))
        shift = float(1 << self.bits - 1) if self.symmetric else parts["zero"].view(-1)
        return Coded(parts["codes"], self.bits, None, parts["scale"].view(-1), shift, self.width(shape[1]))

    def direct(self, parts, dtype):
        return "scale" not in parts

    def shifted(self, parts, delta, shape, slack):
        if self.symmetric:
            return super().shifted(parts, delta, shape, slack)
        groups = delta.float().reshape(shape[0], -1, self.width(shape[1]))
        mean = groups.mean(2)
        if float((groups - mean[..., None]).norm()) > slack:
            raise LorakitError(f"the update is not constant over the base's groups of {self.width(shape[1])}, so zero points cannot hold it; mend: qa-lora "
                               "with a group that is a multiple of it, or another route")
        return parts | {"zero": parts["zero"] - mean / parts["scale"]}

    def rows(self, parts, at, shape, dtype):
        n, m = shape
        if len(PLANES[WORDS[self.bits][1]]) > 1 or m * self.bits % 64:
            return None
        some = {k: v.view(n, -1)[at] for k, v in parts.items()}
        return self.numbers(some | {"codes": some["codes"].view(-1)}, 0, len(at) * m, (len(at), m), dtype).view(-1, m)


def _above_zero(scale: torch.Tensor) -> torch.Tensor:
    """Scales, 1 where a group is all zero."""
    return torch.where(scale > 0, scale, 1.0)
