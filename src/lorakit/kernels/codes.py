"""Codes of 2, 3, 4, 6 or 8 bits packed into bytes, and many of them looked up at once.

A word of 8 or 12 bits holds one, two or four codes, the first in the highest bits (bitsandbytes' order for 4 bits). One look-up in a
table of all words gives all its numbers in one machine item. Words of 12 bits lie as their low bytes, then their high halves in pairs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import Parameter

WORDS = {2: (4, 8), 3: (4, 12), 4: (2, 8), 6: (2, 12), 8: (1, 8)}  # bits of a code -> codes in a word, bits of a word
EVEN = 8  # a range that starts and ends at a multiple of so many codes is whole bytes for every width
_ITEMS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.float64, 16: torch.complex128}  # bytes -> what is looked up as one


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that n codes take."""
    per, wide = WORDS[bits]
    words = -(-n // per)
    words += wide == 12 and words % 2
    return words * wide // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """(n,) uint8 codes -> (packed_bytes,) uint8; what is missing at the end is zero."""
    per, wide = WORDS[bits]
    unit = per * (2 if wide == 12 else 1)
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % unit)).view(-1, per)
    words = torch.zeros(len(codes), dtype=torch.int32, device=codes.device)
    for k in range(per):
        words = words << bits | codes[:, k].int()
    low = (words & 255).to(torch.uint8)
    if wide == 8:
        return low
    high = (words >> 8).to(torch.uint8).view(-1, 2)
    return torch.cat([low, high[:, 0] << 4 | high[:, 1]])


def words(packed: Tensor, bits: int, start: int, stop: int) -> Tensor:
    """The words of the codes start … stop - 1 as int32; start is a multiple of `EVEN`."""
    per, wide = WORDS[bits]
    a, b = start // per, -(-stop // per)
    if wide == 8:
        return packed[a:b].int()
    b += b % 2
    n = len(packed) * 2 // 3
    high = packed[n + a // 2 : n + b // 2]
    return packed[a:b].int() | torch.stack([high >> 4, high & 15], 1).view(-1).int() << 8


def unpack(packed: Tensor, bits: int, start: int, stop: int) -> Tensor:
    """The codes start … stop - 1 as uint8."""
    per, _ = WORDS[bits]
    w = words(packed, bits, start, stop)
    shifts = torch.arange(per - 1, -1, -1, device=w.device) * bits
    return (w[:, None] >> shifts & (1 << bits) - 1).to(torch.uint8).view(-1)[: stop - start]


def table(values: tuple[float, ...], bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What every word stands for, all its numbers in one item: (2^word bits,)."""
    per, wide = WORDS[bits]
    at = torch.arange(1 << wide)[:, None] >> torch.arange(per - 1, -1, -1) * bits & (1 << bits) - 1
    numbers = torch.tensor(values, dtype=torch.float32)[at].to(dtype)
    return numbers.view(_ITEMS[per * numbers.element_size()]).view(-1).to(device) if per > 1 else numbers.view(-1).to(device)


_table = cache(table)


def look_up(packed: Tensor, values: tuple[float, ...], bits: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The numbers that the codes start … stop - 1 stand for, (stop - start,)."""
    tab = _table if type(packed) in (Tensor, Parameter) and not torch.compiler.is_compiling() else table  # nothing is kept of a trace
    items = torch.index_select(tab(values, bits, dtype, packed.device), 0, words(packed, bits, start, stop))
    return items.view(dtype)[: stop - start]
