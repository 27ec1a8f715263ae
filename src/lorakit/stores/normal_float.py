"""NormalFloat: codes at the quantiles of a normal distribution. QLoRA, Dettmers et al., 2023, arXiv 2305.14314.

    c_k = max |w| over block k,   code = nearest of q to w / c_k,   w ≈ q[code] · c_k

q for b bits: δ = (1/2)((1 - 1/30) + (1 - 1/32)); positives Φ⁻¹ of 2^(b-1) + 1 points from δ to 1/2 without the last, negatives -Φ⁻¹ of 2^(b-1)
points, and 0; divided by the largest. For b = 4 the codes, their packing and the constants are bitsandbytes' to the bit.

Double quantisation: μ = mean of all c_k; c_k - μ in 8 bits, blocks of 256, by bitsandbytes' dynamic map. The paper has 8-bit floats there.
Bits per weight: b + 32/block, doubly quantised b + 8/block + 32/(256 block): 4.127 for b = 4 and blocks of 64.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.kernels import decode
from lorakit.kernels.codes import look_up, pack, packed_bytes
from lorakit.kernels.fused import Coded
from lorakit.stores.scheme import Parts, Scheme, checked, scheme

NESTED = 256  # constants in a block of the second quantisation


NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
       0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def normal_codes(bits: int) -> tuple[float, ...]:
    """The 2^bits codes, ascending, from -1 to 1; for 4 bits as published, whose last digits come from sums in another order."""
    if bits == 4:
        return NF4
    delta, half = 0.9677083, 1 << bits - 1
    inverse = NormalDist().inv_cdf

    def side(n: int) -> list[float]:
        return [inverse(delta + (0.5 - delta) * k / (n - 1)) for k in range(n - 1)]

    every = sorted([*side(half + 1), 0.0, *(-v for v in side(half))])
    return tuple(torch.tensor([v / every[-1] for v in every], dtype=torch.float32).tolist())


def dynamic_codes() -> tuple[float, ...]:
    """bitsandbytes' signed dynamic map, 256 numbers: a sign, a decimal exponent told in unary, and a linear fraction."""
    every = [0.0, 1.0]
    for k in range(7):
        edges = torch.linspace(0.1, 1, (1 << k) + 1, dtype=torch.float32)
        middles = 10.0 ** (k - 6) * ((edges[:-1] + edges[1:]) / 2)
        every += [*middles.tolist(), *(-middles).tolist()]
    return tuple(torch.tensor(sorted(every), dtype=torch.float32).tolist())


CODES = {bits: normal_codes(bits) for bits in (2, 3, 4)}
DYNAMIC = dynamic_codes()


def _nearest(x: Tensor, values: tuple[float, ...]) -> Tensor:
    """The code nearest to each number, the lower of two as near."""
    q = torch.tensor(values, device=x.device)
    return torch.bucketize(x, (q[:-1] + q[1:]) / 2).to(torch.uint8)


def _blocks(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Each number over the largest magnitude of its block, and these."""
    n, rest = len(flat), len(flat) % size
    rows = torch.nn.functional.pad(flat, (0, -n % size)).view(-1, size)
    top = rows.abs().amax(1)
    scaled = (rows * (1.0 / top.clamp_min(1e-38))[:, None]).clamp_(-1, 1).view(-1)[:n]
    if rest:  # bitsandbytes divides in a block that is not full
        scaled[-rest:] = flat[-rest:] / top[-1].clamp_min(1e-38)
    return scaled, top


@scheme("normal_float", nf4={"bits": 4}, nf3={"bits": 3}, nf2={"bits": 2})
class NormalFloat(Scheme):
    """b-bit NormalFloat in blocks, its constants in float32 or (`double_quant`) in 8 bits."""

    bits: int = 4
    block: int = 64
    double_quant: bool = True

    title = "NormalFloat (QLoRA)"
    formula = "w ≈ q[code] · c_k,  c_k = max |w| of the block"
    paper = "2305.14314"

    def __post_init__(self):
        if self.bits not in (2, 3, 4):
            raise LorakitError(f"NormalFloat: bits must be 2, 3 or 4, not {self.bits!r}; mend: int8 for 8 bits")
        if not isinstance(self.block, int) or self.block < 8 or self.block % 8:
            raise LorakitError(f"NormalFloat: block must be a multiple of 8, not {self.block!r}")

    @property
    def name(self):
        return f"nf{self.bits}"

    @property
    def step(self):
        return self.block

    def layout(self, n, m):
        k = -(-n * m // self.block)
        out = {"codes": ((packed_bytes(n * m, self.bits),), torch.uint8)}
        if not self.double_quant:
            return out | {"absmax": ((k,), torch.float32)}
        return out | {"absmax": ((k,), torch.uint8), "nested_absmax": ((-(-k // NESTED),), torch.float32), "offset": ((), torch.float32)}

    def parts(self, M):
        flat = checked(M, self.name).reshape(-1)
        scaled, top = _blocks(flat, self.block)
        scaled = torch.nn.functional.pad(scaled, (0, -len(scaled) % 2))  # filled with the code of zero
        codes = {"codes": pack(_nearest(scaled, CODES[self.bits]), self.bits)}
        if not self.double_quant:
            return codes | {"absmax": top}
        offset = top.mean()
        scaled, nested = _blocks(top - offset, NESTED)
        return codes | {"absmax": _nearest(scaled, DYNAMIC), "nested_absmax": nested, "offset": offset}

    def constants(self, parts: Parts, a: int, b: int) -> Tensor:
        """c_a … c_(b-1), float32."""
        if parts["absmax"].dtype == torch.float32:
            return parts["absmax"][a:b]
        c = look_up(parts["absmax"], DYNAMIC, 8, a, b, torch.float32)
        nested = parts["nested_absmax"][a // NESTED : -(-b // NESTED)]
        if a % NESTED or b % NESTED:
            return c * nested.repeat_interleave(NESTED)[a % NESTED :][: b - a] + parts["offset"]  # rounded twice, as in bitsandbytes: no addcmul
        return c.view(-1, NESTED).mul_(nested[:, None]).add_(parts["offset"]).view(-1)

    def rows(self, parts, at, shape, dtype):
        n, m = shape
        if m % self.block or self.bits == 3:
            return None
        blocks = (at[:, None] * (m // self.block) + torch.arange(m // self.block, device=at.device)).view(-1)
        c = parts["absmax"][blocks]
        if self.double_quant:
            c = look_up(c, DYNAMIC, 8, 0, len(c), torch.float32) * parts["nested_absmax"][blocks // NESTED] + parts["offset"]
        flat = look_up(parts["codes"].view(n, -1)[at].view(-1), CODES[self.bits], self.bits, 0, len(at) * m, torch.float32)
        return flat.view(-1, self.block).mul_(c[:, None]).view(-1, m).to(dtype)

    def numbers(self, parts, start, stop, shape, dtype):
        c = self.constants(parts, start // self.block, -(-stop // self.block))
        return decode.blocks(parts["codes"], CODES[self.bits], self.bits, c, self.block, start, stop, dtype)

    def coded(self, parts, shape):
        return Coded(parts["codes"], self.bits, CODES[self.bits], self.constants(parts, 0, len(parts["absmax"])), 0.0, self.block)

    def opened(self, parts):
        return {"codes": parts["codes"], "absmax": self.constants(parts, 0, len(parts["absmax"]))}

    def direct(self, parts, dtype):
        return decode.operator(parts["codes"], CODES[self.bits], self.bits, self.block, self.block, dtype) is not None
