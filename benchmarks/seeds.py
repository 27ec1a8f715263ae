"""A benchmark that trains and measures the same once for every seed, and what it says of them."""

from __future__ import annotations

import argparse
import datetime
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorakit.experiments.stats import mean


def run(text: str | None, one: Callable[[argparse.Namespace, int, Path], Any], page: Callable[[list[Any], argparse.Namespace], str],
        **defaults: int | float) -> None:
    """`one(options, seed, folder)` for every seed, in a folder that goes away; the page of what they gave is printed, and written to --out.

    The options are the data's folder, those of `defaults` and --out; `options.machine` says when, how long and where, for the page.
    """
    ap = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("data", type=Path)
    for name, value in defaults.items():
        ap.add_argument(f"--{name}", type=type(value), default=value)
    ap.add_argument("--out", type=Path)
    a = ap.parse_args()
    torch.set_num_threads(1)
    start, got = time.process_time(), []
    for seed in range(a.seeds):
        with tempfile.TemporaryDirectory() as where:
            got.append(one(a, seed, Path(where)))
    a.machine = (f"on {datetime.date.today()} in {time.process_time() - start:.0f} s of processor time ({platform.machine()}, one thread, "
                 f"torch {torch.__version__})")
    made = page(got, a)
    print(made)
    if a.out:
        a.out.write_text(made, encoding="utf-8")


def shown(values: list[float], sign: str = "") -> str:
    """The mean, ± half of the 95 % interval where there are several."""
    m = mean(values)
    return f"{m.mean:{sign}.3f}" + ("" if m.half is None else f" ± {m.half:.3f}")
