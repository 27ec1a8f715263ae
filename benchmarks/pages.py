"""The pages made of finished comparisons: one table for each, what is asked of it above, what more its run folders tell below.

    lorakit compare benchmarks/family.yaml --jobs 2
    python -m benchmarks.pages runs/family        # writes docs/family.md; so for starts, hooks

Times are left out where other work ran beside.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import hooks
from lorakit.experiments import table
from lorakit.training.config import read_yaml
from lorakit.training.report import human

Cell, Record = dict[str, Any], dict[str, Any]
Column = tuple[str, Callable[[Path, Record, Cell], str]]  # its head, and what a cell has in it


@dataclass(frozen=True)
class Page:
    """What is particular to one comparison's page."""

    text: str  # a title and a paragraph, with the fields of `facts`
    columns: tuple[Column, ...] = ()  # beside those of every page
    sections: Callable[[Path, Record], str] = lambda folder, told: ""


FAMILY = """# Does every method learn?

One small real model (stories260k, 260 thousand parameters, trained on children's stories) learns restaurant descriptions (E2E): {rows} rows, {steps}
steps of {batch} rows, the same data for all; loss per token on {eval_rows} held-out rows, mean ± half of the 95 % interval over {seeds} seeds.{rates}
So the order of neighbours means little; what the table shows is that each method moves, by how much, and at what size. The sizes are those of
benchmarks/family.yaml, not equal numbers of parameters. Names with "-form" are the parametrisation alone, without the policy that prunes or
freezes while training."""

STARTS = """# Where should a LoRA start?

One small real model (stories260k, 260 thousand parameters, trained on children's stories) learns Shakespeare's plays with a LoRA of rank 8 and alpha 8
from every starting point: {steps} steps of {batch} pieces of {length} tokens, the same for all; loss per token on the end of the text, which is held out,
mean ± half of the 95 % interval over {seeds} seeds.{rates} A start is to make the beginning faster, so the held-out loss of those same runs after the first
{early} steps stands beside the end; their rate falls over all {steps} steps. Names with "-nf3" are on the same base in 3 bits, where "before" says what
the start gives back of what the bits lost."""

HOOKS = """# What does each hook do?

One small real model (stories260k, 260 thousand parameters, trained on children's stories) learns restaurant descriptions (E2E): {rows} rows, {steps}
steps of {batch} rows, the same data for all; loss per token on {eval_rows} held-out rows, mean ± half of the 95 % interval over {seeds} seeds.{rates}
"Minus without" is the loss minus that of the same adapter without the hook, paired by seed, with half of its own 95 % interval, not corrected for their
number; `*`: the interval leaves zero out. Ranks and entries are those of the saved adapters: the lowest and the highest rank of a target, and how many of
the file's numbers are not zero (diff pruning: of the change that its gates let through). Settings are in benchmarks/hooks.yaml; schedules are cut to
{steps} steps, far from those of the papers, so a hook that shows no gain here may show one in a long training: the table shows that each acts, and what
it costs in loss."""

EARLY = (10, 20, 50)


def facts(folder: Path, told: Record) -> dict[str, Any]:
    """What the texts say of a comparison."""
    s, cells = told["settings"], told["cells"]
    first = next(c for c in cells if c["values"] and c["kind"] != "none")
    run = read_yaml(folder / first["cell"] / f"seed-{next(iter(first['values']))}" / "config.yaml")
    rates = f' {table.tuned(told)}; "edge": the best is the first or last that was tried, and another might be better.' if told["tuning"] else ""
    return {"rows": told["data"]["rows"], "eval_rows": told["data"]["eval_rows"], "steps": s["budget"]["steps"], "batch": run["train"]["batch_size"],
            "length": run["data"]["max_length"], "seeds": max(c["n"] for c in cells), "rates": rates, "early": ", ".join(map(str, EARLY))}


def _merged(folder: Path, told: Record, c: Cell) -> str:
    return "" if c["kind"] == "none" else "does not merge" if c["merge_loss"] is None else f"{c['merge_loss']:.0e}"


def _early(step: int) -> Column:
    def at(folder: Path, told: Record, c: Cell) -> str:
        return next((f"{row[1]:.3f}" for row in told["curves"].get(c["cell"], {}).get("eval_loss", ()) if row[0] == step), "")

    return f"after {step} steps", at


FIRST: tuple[Column, ...] = (
    ("configuration", lambda folder, told, c: c["cell"]),
    ("before", lambda folder, told, c: f"{c['before']:.3f}"),
    ("after", lambda folder, told, c: f"{c['mean']:.3f}" + (f" ± {c['half']:.3f}" if c["half"] is not None else "")),
)
LAST: tuple[Column, ...] = (
    ("learning rate", lambda folder, told, c: "" if c["learning_rate"] is None else table.rate(c)),
    ("rates tried", lambda folder, told, c: str(c["rates_tried"] or "")),
    ("trains", lambda folder, told, c: f"{c['trainable'] or 0:,.0f}"),
    ("file", lambda folder, told, c: human(c["adapter_bytes"] or 0, "bytes")),
    ("kept for backward", lambda folder, told, c: human(c["saved_bytes"], "bytes") if c["saved_bytes"] else ""),
    ("merged differs by", _merged),
)
PAGES = {
    "family": Page(FAMILY),
    "starts": Page(STARTS, tuple(map(_early, EARLY))),
    "hooks": Page(HOOKS, (("minus without", hooks.less), ("ranks", hooks.ranks), ("entries not zero", hooks.entries)), hooks.sections),
}


def page(folder: Path, told: Record, what: Page) -> str:
    """A comparison as Markdown."""
    cells, m = [c for c in told["cells"] if c["mean"] is not None], told["machine"]
    columns = (*FIRST, *what.columns, *LAST)
    out = [f"<!-- made by python -m benchmarks.pages {folder} from a run of lorakit compare -->", "", what.text.format(**facts(folder, told)), "",
           f"{sum(c['n'] for c in cells if c['verify'])} of {sum(c['n'] for c in cells if c['kind'] != 'none')} saved adapters passed `verify`.", "",
           f"    {told['command']}", "", f"{m['cpu']}, {m['cores']} cores, {m['date'][:10]}, torch {m['versions']['torch']}.", "",
           "| " + " | ".join(head for head, _ in columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    out += ["| " + " | ".join(show(folder, told, c) for _, show in columns) + " |" for c in cells]
    worse = [c["cell"] for c in cells if c["kind"] != "none" and not c["mean"] + (c["half"] or 0) < c["before"]]
    out += ["", f"Not below where they started by more than their interval: {', '.join(worse)}." if worse
            else "Every one is below where it started, by more than its interval."]
    out += [f"{c['cell']} failed with {c['failed']} of {c['failed'] + c['n']} seeds: {c['error']}" for c in told["cells"] if c["failed"]]
    return "\n".join(out) + "\n" + what.sections(folder, told)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("folder", type=Path)
    args.add_argument("--page", choices=PAGES, help="by default the folder's name")
    args.add_argument("--out", type=Path, help="by default docs/<page>.md")
    given = args.parse_args()
    name = given.page or given.folder.name
    if name not in PAGES:
        args.error(f"no page is called {name}; mend: --page {', '.join(PAGES)}")
    told = json.loads((given.folder / "comparison.json").read_text(encoding="utf-8"))
    (given.out or Path(f"docs/{name}.md")).write_text(page(given.folder, told, PAGES[name]), encoding="utf-8")


if __name__ == "__main__":
    main()
