"""Does every method learn? The table of a finished `lorakit compare benchmarks/family.yaml` as a page; times are left out where other work ran beside.

    lorakit compare benchmarks/family.yaml --jobs 2
    python -m benchmarks.family runs/family --out docs/family.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lorakit.training.report import human

HEAD = """<!-- made by python -m benchmarks.family from a run of lorakit compare -->

# Does every method learn?

One small real model (stories260k, 260 thousand parameters, trained on children's stories) learns restaurant descriptions (E2E): {rows} rows, {steps}
steps of {batch} rows, the same data for all; loss per token on {eval_rows} held-out rows, mean ± half of the 95 % interval over {seeds} seeds. Each
configuration's learning rate comes from the grid {grid} with {trial} steps a trial; "edge": a wider grid might find a better one. So the
order of neighbours means little; what the table shows is that each method moves, by how much, and at what size. The sizes are those of
benchmarks/family.yaml, not equal numbers of parameters. Names with "-form" are the parametrisation alone, without the policy that prunes or
freezes while training. All {verified} saved adapters passed `verify`.

    {command}

{cpu}, {cores} cores, {date}, torch {torch}.

| configuration | before | after | learning rate | trains | file | kept for backward | merged differs by |
|---|---:|---:|---:|---:|---:|---:|---:|
"""


def row(c: dict[str, Any]) -> str:
    after = f"{c['mean']:.3f} ± {c['half']:.3f}" if c["error"] is None else c["error"]
    rate = "" if c["learning_rate"] is None else f"{c['learning_rate']:g}" + (" (edge)" if c["rate_at_edge"] else "")
    merged = "" if c["kind"] == "none" else "does not merge" if c["merge_loss"] is None else f"{c['merge_loss']:.0e}"
    kept = human(c["saved_bytes"], "bytes") if c["saved_bytes"] else ""
    cells = (c["cell"], f"{c['before']:.3f}", after, rate, f"{c['trainable'] or 0:,.0f}", human(c["adapter_bytes"] or 0, "bytes"), kept, merged)
    return f"| {' | '.join(cells)} |\n"


def page(told: dict[str, Any]) -> str:
    s, m = told["settings"], told["machine"]
    cells = told["cells"]
    worse = [c["cell"] for c in cells if c["kind"] != "none" and not c["mean"] + c["half"] < c["before"]]
    head = HEAD.format(rows=told["data"]["rows"], eval_rows=told["data"]["eval_rows"], steps=s["budget"]["steps"], batch=8, seeds=max(c["n"] for c in cells),
                       grid=s["tune"]["learning_rate"], trial=s["tune"]["budget"]["steps"], verified=sum(c["n"] for c in cells if c["verify"]),
                       command=told["command"], cpu=m["cpu"], cores=m["cores"], date=m["date"][:10], torch=m["versions"]["torch"])
    tail = "Every one is below where it started, by more than its interval.\n"
    tail = tail if not worse else f"Not below where they started by more than their interval: {', '.join(worse)}.\n"
    return head + "".join(map(row, cells)) + "\n" + tail


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("folder", type=Path)
    args.add_argument("--out", type=Path, default=Path("docs/family.md"))
    given = args.parse_args()
    given.out.write_text(page(json.loads((given.folder / "comparison.json").read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
