"""The conformance matrix as a page: every method, plain and under the magnitude wrapper, on every kind of target, in several dtypes.

    python -m lorakit.testing.matrix --out docs/conformance.md --dtypes float32,bfloat16 --jobs 2

A cell says how many checks passed, or by a number why the method means nothing there. The check of torch.compile, slow as it is, has
its own turn in the test-suite. Methods around a whole model are tested apart (tests/test_prompts.py). Exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import platform
import sys
from pathlib import Path

import torch

from lorakit.errors import LorakitError
from lorakit.method import METHODS, Around, Method, Wrapper
from lorakit.methods.magnitude import Magnitude
from lorakit.testing.conformance import CHECKS, EXCEPTIONS, LAYERS, Case, examples, label


def rows() -> list[Method]:
    """One instance of each example of each method, and the same under the magnitude wrapper where that means something."""
    plain = [m for cls in METHODS.values() if not issubclass(cls, Wrapper | Around) for m in examples(cls)]
    out = []
    for m in plain:
        out.append(m)
        try:
            out.append(Magnitude(m))
        except LorakitError:
            continue
    return out


def cell(at: tuple[int, str, str]) -> tuple[int, list[str], str]:
    """(checks passed, what failed, why it means nothing there)."""
    torch.set_num_threads(1)
    method = rows()[at[0]]
    c = Case(method, at[1], at[2])
    why = c.method.unfit(c.site)
    if why:
        return 0, [], why
    passed, failed = 0, []
    for name in c.checks:
        if name == "compile" or (label(method), name) in EXCEPTIONS:
            continue
        try:
            CHECKS[name](c)
            passed += 1
        except Exception as e:
            failed.append(f"{name}: {e}")
    return passed, failed, ""


def page(dtypes: list[str], jobs: int) -> tuple[str, list[str]]:
    every, layers = rows(), list(LAYERS)
    ats = [(n, y, d) for n in range(len(every)) for y in layers for d in dtypes]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        told = dict(zip(ats, pool.map(cell, ats, chunksize=4), strict=True))
    reasons: dict[str, int] = {}
    wrong, lines = [], []
    for n, m in enumerate(every):
        cells = []
        for y in layers:
            parts = []
            for d in dtypes:
                passed, failed, why = told[n, y, d]
                wrong += [f"{label(m)} on {y} in {d}: {f}" for f in failed]
                parts.append(f"[{reasons.setdefault(why, len(reasons) + 1)}]" if why else f"**{len(failed)} failed**" if failed else str(passed))
            cells.append(parts[0] if len(set(parts)) == 1 else " / ".join(parts))
        lines.append(f"| {label(m)} | {' | '.join(cells)} |")
    total = sum(p for p, _, _ in told.values())
    head = (f"<!-- made by python -m lorakit.testing.matrix -->\n\n# Conformance: every method on every kind of target\n\n"
            f"How many checks of `lorakit.testing` passed in {' / '.join(dtypes)} (one number where they are the same); [n] is a reason below. "
            f"{total:,} checks passed, {len(wrong)} failed. Several instances of a method have other fields off "
            f"their defaults. Methods around a whole model (prompts, prefixes) have tests/test_prompts.py.\n\n"
            f"torch {torch.__version__}, {platform.machine()}, {datetime.date.today()}.\n\n"
            f"| method | {' | '.join(layers)} |\n|---|{'---|' * len(layers)}\n")
    notes = "".join(f"{k}. {why}\n" for why, k in reasons.items())
    return head + "\n".join(lines) + (f"\n\n## Why a method means nothing there\n\n{notes}" if notes else "\n"), wrong


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("--out", type=Path, default=Path("docs/conformance.md"))
    args.add_argument("--dtypes", default="float32,bfloat16")
    args.add_argument("--jobs", type=int, default=2)
    given = args.parse_args()
    text, wrong = page(given.dtypes.split(","), given.jobs)
    given.out.write_text(text, encoding="utf-8")
    print("\n".join(wrong))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
