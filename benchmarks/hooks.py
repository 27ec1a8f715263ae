"""What the hooks of benchmarks/hooks.yaml leave behind, read from the saved adapters; and the rows they train on.

    python -m benchmarks.hooks runs/hooks-rows.jsonl

The rows are those of the E2E data, each with a `task`: descriptions of places that are family friendly, and of all others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lorakit import api
from lorakit.formats.folder import Folder, Part
from lorakit.hooks import Hook, build
from lorakit.hooks.components import triplet
from lorakit.hooks.dylora import at_rank
from lorakit.training import config, data
from lorakit.training.base import reread
from lorakit.training.measure import evaluate
from lorakit.training.prepare import prepare

E2E = "../shared/data/e2e/valid.txt"
SINGULAR = 1e-4  # of the largest singular value: below it one counts as zero

Cell, Record = dict[str, Any], dict[str, Any]


def settings(told: Record, name: str) -> dict[str, Any]:
    """What the comparison's file says of a cell."""
    return next(s for s in told["settings"]["cells"] if s["name"] == name)


def hook_of(told: Record, name: str) -> Hook | None:
    """The hook that a cell is about."""
    given = settings(told, name)["hooks"]
    return build(given[0]) if given else None


def without(told: Record, c: Cell) -> str | None:
    """The cell of the same adapter without hooks."""
    mine = settings(told, c["cell"])
    same = [s["name"] for s in told["settings"]["cells"] if s["adapter"] == mine["adapter"] and not s["hooks"]]
    return same[0] if mine["hooks"] and same else None


@cache
def saved(run: Path) -> Folder:
    """A run's adapter, read once."""
    return Folder(run / "adapter")


def runs(folder: Path, c: Cell) -> list[Path]:
    return [folder / c["cell"] / f"seed-{seed}" for seed in c["values"]] if c["kind"] == "lorakit" else []


def rank(part: Part) -> int | None:
    """Of one target, components behind a closed gate not counted; None where its method has no rank."""
    if gate := triplet(part.method):
        return int((part.leaves[gate[1]] != 0).sum())
    found = [t.shape[axes.index("r")] for k, t in part.leaves.items() if "r" in (axes := part.method.leaves[k].axes.split())]
    return min(found) if found else None


def less(folder: Path, told: Record, c: Cell) -> str:
    """The loss minus that without the hook."""
    other = without(told, c)
    d = next((d for d in told["differences"] if {d["a"], d["b"]} == {c["cell"], other}), None)
    if d is None:
        return ""
    by = d["mean"] if d["a"] == c["cell"] else -d["mean"]
    return f"{by:+.3f}" + (f" ± {d['half']:.3f}" + "*" * (abs(by) > d["half"]) if d["half"] is not None else "")


def ranks(folder: Path, told: Record, c: Cell) -> str:
    """The lowest and the highest of all targets and seeds."""
    found = sorted({r for run in runs(folder, c) for part in saved(run).parts().values() if (r := rank(part)) is not None})
    return "" if not found else str(found[0]) if len(found) == 1 else f"{found[0]} – {found[-1]}"


def numbers(adapter: Folder) -> list[torch.Tensor]:
    """The tensors of a file; of a target whose entries have a gate each, the change that the gates let through."""
    parts = [part for part in adapter.parts().values() if hasattr(part.method.core, "change")]
    return [part.method.core.change(part.leaves, False) for part in parts] or list(adapter.tensors.values())


def entries(folder: Path, told: Record, c: Cell) -> str:
    """How many of these numbers are not zero, the mean over seeds, and of how many."""
    files = [[(int(t.count_nonzero()), t.numel()) for t in numbers(saved(run))] for run in runs(folder, c)]
    left, whole = (sum(t[n] for some in files for t in some) / max(len(files), 1) for n in (0, 1))
    return f"{left:,.0f} of {whole:,.0f}" if files else ""


def cells_with(told: Record, *names: str) -> Iterator[tuple[Cell, Hook]]:
    """The cells about one of these hooks that ended well, in the order of the file."""
    done = {c["cell"]: c for c in told["cells"] if c["values"]}
    for s in told["settings"]["cells"]:
        if s["name"] in done and (h := hook_of(told, s["name"])) and h.name in names:
            yield done[s["name"]], h


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1), *("| " + " | ".join(row) + " |" for row in rows), ""])


def budget(folder: Path, told: Record) -> str:
    """AdaLoRA's budget and what it left, for every seed."""
    rows = []
    for c, h in cells_with(told, "adalora", "dora_dynamic"):
        for run in runs(folder, c):
            found = {path: rank(part) for path, part in saved(run).parts().items()}
            by: dict[str, list[int]] = {}
            for path, r in found.items():
                by.setdefault(path.rpartition(".")[2], []).append(r)
            means = ", ".join(f"{kind} {sum(r) / len(r):.1f}" for kind, r in sorted(by.items()))
            start = settings(told, c["cell"])["adapter"]["r"] * len(found)
            rows.append([c["cell"], run.name.removeprefix("seed-"), str(start), str(h.target_r * len(found)), str(sum(found.values())),
                         f"{min(found.values())} – {max(found.values())}", means])
    heads = ["configuration", "seed", "components at first", "budget", "left in the file", "on one target", "mean by layer"]
    return ("\n## One budget for all layers\n\nThe rank-one components of the saved adapters beside the budget of the end, target_r for each target.\n\n"
            + grid(heads, rows)) if rows else ""


def curve(folder: Path, told: Record) -> str:
    """DyLoRA's held-out loss at every rank taken out of one adapter, beside plain LoRA's cut off."""
    shown = [c for c, _ in cells_with(told, "dylora")]
    plain = {without(told, c) for c in shown}
    shown += [c for c in told["cells"] if c["cell"] in plain]
    rows, at = [], ()
    for c in shown:
        losses = []
        for path in runs(folder, c):
            run = config.parse(config.read_yaml(path / "config.yaml"))
            p, adapter = prepare(run), saved(path)
            model = api.load(reread(run, adapter), adapter.path)
            at = [r for r in (1, 2, 4, 8, 16, 32) if r <= min(part.method.core.r for part in adapter.parts().values())]
            for r in at:
                at_rank(model, "default", r, f"rank {r}")
            losses.append([evaluate(api.activate(model, f"rank {r}"), p)["eval_loss"] for r in at])
        rows.append([c["cell"], *(f"{sum(some) / len(some):.3f}" for some in zip(*losses, strict=True))])
    return ("\n## Every rank from one training\n\nHeld-out loss of the first ranks of one saved adapter, alpha as it was; mean over seeds. Without the "
            "hook the ranks are only cut off.\n\n" + grid(["configuration", *(f"rank {r}" for r in at)], rows)) if rows else ""


def numerical_rank(B: torch.Tensor, A: torch.Tensor) -> int:
    """Of the product B A, from its factors: singular values above `SINGULAR` times the largest."""
    QB, QA = (torch.linalg.qr(t.double())[1] for t in (B, A.mT))
    s = torch.linalg.svdvals(QB @ QA.mT)
    return int((s > SINGULAR * s[0]).sum()) if s[0] > 0 else 0


def growing(folder: Path, told: Record) -> str:
    """The rank of the sum of the rounds so far. A file holds them side by side, the last one first."""
    rows, most = [], 0
    for c, _ in cells_with(told, "relora", "cola", "two_stage"):
        r = settings(told, c["cell"])["adapter"]["r"]
        means: list[list[int]] = []
        for run in runs(folder, c):
            for part in saved(run).parts().values():
                A, B = part.leaves["A"], part.leaves["B"]
                means.append([numerical_rank(B[:, -n:], A[-n:]) for n in range(r, len(A) + 1, r)])
        most = max(most, len(means[0]))
        rows.append([c["cell"], *(f"{sum(n) / len(n):.1f}" for n in zip(*means, strict=True))])
    rows = [row + [""] * (most + 1 - len(row)) for row in rows]
    return ("\n## A sum of rounds\n\nThe rank of all that the rounds so far add to a weight, the mean over targets and seeds (singular values above "
            f"{SINGULAR:g} of the largest), from the saved adapters.\n\n"
            + grid(["configuration", *(f"after round {n}" for n in range(1, most + 1))], rows)) if rows else ""


def sections(folder: Path, told: Record) -> str:
    """The short tables below the page's."""
    return budget(folder, told) + curve(folder, told) + growing(folder, told)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("rows", type=Path)
    args.add_argument("--of", default=E2E)
    given = args.parse_args()
    rows = [row | {"task": "family" if "family friendly : yes" in row["prompt"] else "other"} for row in data.read_rows(given.of)]
    given.rows.parent.mkdir(parents=True, exist_ok=True)
    given.rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{given.rows}: {len(rows)} rows, {sum(row['task'] == 'family' for row in rows)} of them of family-friendly places")


if __name__ == "__main__":
    main()
