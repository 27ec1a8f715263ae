"""The product with a packed weight in one Triton kernel, against making the matrix first, on a CUDA device.

    python -m benchmarks.fused

One weight of 4096 x 4096 in bfloat16, forward; the median of 200 launches by the device's own clock, both ways in turn, the caches emptied before each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from unittest import mock

import torch

from lorakit.kernels import fused
from lorakit.stores.product import times
from lorakit.stores.scheme import scheme_of

SCHEMES = ("nf4", "nf2", "int8", "int4")
TOKENS = (1, 16, 64, 512)
SIZE, ROUNDS, CACHE = 4096, 200, 256 << 20


def one(call, scrap: torch.Tensor) -> float:
    """Microseconds of a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    scrap.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def row(given: str, tokens: int, scrap: torch.Tensor) -> str:
    s, shape = scheme_of(given), (SIZE, SIZE)
    parts = s.parts(torch.randn(shape, device="cuda"))
    x = torch.randn(tokens, SIZE, device="cuda", dtype=torch.bfloat16)

    def fast() -> torch.Tensor:
        return times(x, None, s, shape, parts)

    def slow() -> torch.Tensor:
        with mock.patch.object(fused, "TOKENS", 0):
            return times(x, None, s, shape, parts)

    taken = fused.wanted(x) and fused.product(x, None, s.coded(parts, shape), shape) is not None
    took: dict = {slow: []} | ({fast: []} if taken else {})
    for k in range(ROUNDS + 10):
        for call, times_ in took.items():
            t = one(call, scrap)
            if k >= 10:
                times_.append(t)
    before = statistics.median(took[slow])
    if not taken:
        return f"| {given} | {tokens} | {before:.0f} | not taken | |"
    after = statistics.median(took[fast])
    return f"| {given} | {tokens} | {before:.0f} | {after:.0f} | {before / after:.1f} |"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.fused needs a CUDA device, and this PyTorch sees none")
    scrap = torch.empty(CACHE, dtype=torch.uint8, device="cuda")
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {SIZE} x {SIZE}, bfloat16\n")
    print("| scheme | tokens | matrix first, µs | fused, µs | times as fast |\n|---|---:|---:|---:|---:|")
    for given in SCHEMES:
        for tokens in TOKENS:
            print(row(given, tokens, scrap), flush=True)


if __name__ == "__main__":
    main()
