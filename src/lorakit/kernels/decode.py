"""Numbers that are kept as a code and a constant for each block: w = q[code] · c_k. The one place where it is chosen who makes them.

`blocks_slow` is the definition, for every width, dtype and device. On a CPU with AVX-512 the operator of bitsandbytes, `dequantize_4bit`, makes the numbers
of 4-bit tables that it knows in one pass, two to three times as fast. It is taken where bitsandbytes has been imported, and imported for it (a second or
two, 120 MB) only once as many numbers were made as take about that long; never while a graph is traced. Before its first use for a table, a block size
and a dtype it makes every byte's numbers in a trial, which must equal the definition to the bit: results do not depend on whether it is there.
"""

from __future__ import annotations

import logging
import sys
import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import Parameter

from lorakit.kernels.codes import look_up

LIBRARY = "bitsandbytes"
BLOCKS = (32, 64, 128, 256, 512, 1024)  # of the operator; it takes 2048 and 4096 too, but slowly
WORTH = 1 << 33  # numbers whose making takes as long as importing the library
_made = 0


def blocks_slow(codes: Tensor, values: tuple[float, ...], bits: int, c: Tensor, block: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    flat = look_up(codes, values, bits, start, stop, torch.float32)
    if (stop - start) % block:
        return (flat * c.repeat_interleave(block)[: stop - start]).to(dtype)
    return flat.view(-1, block).mul_(c[:, None]).view(-1).to(dtype)


def blocks(codes: Tensor, values: tuple[float, ...], bits: int, c: Tensor, block: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The numbers start … stop - 1, (stop - start,): packed codes, the table q, float32 constants c of the blocks from number `start` on, which begins one."""
    kind = operator(codes, values, bits, block, stop - start, dtype)
    if kind is None:
        return blocks_slow(codes, values, bits, c, block, start, stop, dtype)
    return _operator(codes[start // 2 : stop // 2], c, block, kind, dtype)


def operator(codes: Tensor, values: tuple[float, ...], bits: int, block: int, n: int, dtype: torch.dtype) -> str | None:
    """What bitsandbytes calls the table where its operator makes n numbers, else None."""
    global _made
    if bits != 4 or block not in BLOCKS or n % block or not n or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if codes.device.type != "cpu" or type(codes) not in (Tensor, Parameter) or torch.compiler.is_compiling():
        return None
    if LIBRARY not in sys.modules:
        _made += n
        if _made < WORTH:
            return None
    return _agreed(values, block, dtype)


def _operator(codes: Tensor, c: Tensor, block: int, kind: str, dtype: torch.dtype) -> Tensor:
    # a row of its matrix is a block here, as it reads blocks that straddle rows wrongly
    return torch.ops.bitsandbytes.dequantize_4bit(codes, c, block, kind, (len(c), block), dtype).view(-1)


@cache
def _kinds() -> dict[tuple[float, ...], str]:
    """The tables that the library's own code for this CPU knows; none where it is missing, broken or has no such code."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not find_spec(LIBRARY):
        return {}
    log = logging.getLogger(LIBRARY)
    level = log.level
    try:
        log.setLevel(logging.ERROR)  # it warns of a product that is not used here
        from bitsandbytes.functional import get_4bit_type
    except Exception as e:  # whatever a foreign library raises
        warnings.warn(f"{LIBRARY} is there but cannot be imported ({e}); packed weights are made by PyTorch alone, more slowly", stacklevel=2)
        return {}
    finally:
        log.setLevel(level)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{LIBRARY}::dequantize_4bit", "CPU"):
        return {}
    return {tuple(get_4bit_type(kind, device="cpu").tolist()): kind for kind in ("nf4", "fp4")}


@cache
def _agreed(values: tuple[float, ...], block: int, dtype: torch.dtype) -> str | None:
    """The table's name where a trial with every byte gives the definition's numbers to the bit."""
    with torch.inference_mode(False), torch.no_grad():
        kind = _kinds().get(values)
        if kind is None:
            return None
        k = 512 // block or 1
        codes = torch.arange(k * block // 2, dtype=torch.int32, device="cpu").to(torch.uint8)
        c = torch.logspace(-6, 3, k, device="cpu")
        want = blocks_slow(codes, values, 4, c, block, 0, k * block, dtype)
        try:
            same = torch.equal(_operator(codes, c, block, kind, dtype), want)
        except Exception:  # an operator of another form
            same = False
    if not same:
        warnings.warn(f"{LIBRARY} does not make the numbers of {kind} in blocks of {block} as {dtype} that it should; packed weights are made by PyTorch "
                      "alone, more slowly", stacklevel=2)
    return kind if same else None
