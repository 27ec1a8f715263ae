"""Codes of 2 to 8 bits packed into bytes, and many of them looked up at once.

A word of 8 to 14 bits holds one, two or four codes, the first in the highest bits (bitsandbytes' order for 4 bits). One look-up in a
table of all words gives all its numbers in one machine item. What a word has beyond its low byte lies behind all low bytes: the next 4 bits of
every two words in a byte, and the next (or last) 2 of every four.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import Parameter

WORDS = {2: (4, 8), 3: (4, 12), 4: (2, 8), 5: (2, 10), 6: (2, 12), 7: (2, 14), 8: (1, 8)}  # bits of a code -> codes in a word, bits of a word
PLANES = {8: (8,), 10: (8, 2), 12: (8, 4), 14: (8, 4, 2)}  # bits of a word -> how many of them, from the lowest on, lie together
EVEN = 8  # a range that starts and ends at a multiple of so many codes is whole bytes for every width
_ITEMS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.float64, 16: torch.complex128}  # bytes -> what is looked up as one


def _whole(words: int, wide: int) -> int:
    """So many words or a few more, which are whole bytes."""
    some = 8 // PLANES[wide][-1]
    return -(-words // some) * some


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that n codes take."""
    per, wide = WORDS[bits]
    return _whole(-(-n // per), wide) * wide // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """(n,) uint8 codes -> (packed_bytes,) uint8; what is missing at the end is zero."""
    per, wide = WORDS[bits]
    unit = per * _whole(1, wide)
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % unit)).view(-1, per)
    words = torch.zeros(len(codes), dtype=torch.int32, device=codes.device)
    for k in range(per):
        words = words << bits | codes[:, k].int()
    out = []
    for width in PLANES[wide]:
        part = (words & (1 << width) - 1).to(torch.uint8).view(-1, 8 // width)
        byte = part[:, 0]
        for k in range(1, 8 // width):
            byte = byte << width | part[:, k]
        out.append(byte)
        words = words >> width
    return torch.cat(out)


def words(packed: Tensor, bits: int, start: int, stop: int) -> Tensor:
    """The words of the codes start … stop - 1 as int32; start is a multiple of `EVEN`."""
    per, wide = WORDS[bits]
    a, b, n = start // per, _whole(-(-stop // per), wide), len(packed) * 8 // wide
    out, at, low = packed[a:b].int(), n, 8
    for width in PLANES[wide][1:]:
        some = 8 // width
        high = packed[at + a // some : at + b // some]
        out |= torch.stack([high >> 8 - width * (k + 1) & (1 << width) - 1 for k in range(some)], 1).view(-1).int() << low
        at, low = at + n // some, low + width
    return out


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
