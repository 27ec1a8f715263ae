"""What each hook adds to the time of a step, beside the same adapter without it.

    python -m benchmarks.overhead --out docs/overhead.md
    python -m benchmarks.overhead --hooks lora_plus,relora --rounds 10

Both train in one process, a step of each in turn (who is first alternates), and the ratio of the two is taken in every round: forward, backward, optimiser
and all that the hook does. Rounds in which a hook does what it does only now and then are told apart from the others, by its own schedule.
Beside the clock, one ordinary step of each is counted: forward passes, operations of matrices, calls of torch's operators. These say why.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lorakit
from benchmarks.price import TIME, base
from lorakit.hooks import HOOKS, build, hooked

warnings.filterwarnings("ignore")
EVERY, WARM, AIM = 8, 2, 1.05
LORA = {"r": 16}
GATED = {"r": 24}
Acts = Callable[[int, int], bool]  # (number of the step, how many there are) -> whether the hook's periodic work is in it


def never(t: int, n: int) -> bool:
    return False


def begins(t: int, n: int) -> bool:
    return t % EVERY == 0


def ends(t: int, n: int) -> bool:
    return (t + 1) % EVERY == 0


@dataclass(frozen=True)
class Case:
    """A hook, what it is on, and when it does more than in other steps."""

    options: dict[str, Any]
    recipe: str = "lora"
    sizes: dict[str, Any] | None = None
    acts: Acts = never


CASES: dict[str, Case] = {
    "lora_plus": Case({}), "lora_fa": Case({}), "riemannian": Case({}), "lora_sp": Case({}), "factor_decay": Case({}), "lora_dropout": Case({}),
    "hra_orthogonality": Case({}, "hra", {"r": 8}), "hidden_key": Case({}), "pcgrad": Case({}), "gradvac": Case({}), "cagrad": Case({}),
    "dropbp": Case({"measure": 0.25}, acts=lambda t, n: t + 1 == round(n / 4)),
    "lisa": Case({"layers": 1, "every": EVERY}, "full", {}, begins), "galore": Case({"r": 16, "every": EVERY}, "full", {}, begins),
    "flora": Case({"r": 16, "every": EVERY}, "full", {}, begins),
    "relora": Case({"every": EVERY, "warmup": 2}, acts=ends), "cola": Case({"every": EVERY}, acts=ends), "xgblora": Case({"every": EVERY}, acts=ends),
    "two_stage": Case({"at": 0.5}, acts=lambda t, n: t + 1 == round(n / 2)), "delta_lora": Case({"after": 0}),
    "adalora": Case({"target_r": 16, "delta_t": EVERY}, "adalora", GATED, ends), "sora": Case({}, "sora", LORA),
    "dora_dynamic": Case({"target_r": 16, "every": EVERY, "warmup": 0.0, "rest": 0.2}, "trilora", GATED, ends),
    "alora": Case({"target_r": 4, "first": EVERY, "every": EVERY, "rounds": 100}, "sora", {"r": 8}, ends),
    "bilora": Case({}, "adalora", LORA), "autolora": Case({}, "sora", LORA), "dylora": Case({}), "prilora": Case({"every": EVERY}, acts=ends),
    "rose_lora": Case({}), "aflora": Case({"every": EVERY}, "aflora", LORA, ends),
    "sparse_adapter": Case({"at": EVERY}, acts=lambda t, n: t == EVERY), "lora_prune": Case({"every": EVERY}, "lora-prune", LORA, ends),
    "diff_pruning": Case({"fix": 0.5}, "diff-pruning", {}, lambda t, n: t + 1 == int(n / 2)),
}


class Count(TorchDispatchMode):
    """Calls of torch's operators, views and other bookkeeping left out."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.n += not (func.is_view or func.namespace == "prim")
        return out


class Loop:
    """A model in training, one step at a call."""

    def __init__(self, case: Case, hooks: list[Any], total: int, stack: ExitStack):
        self.model = lorakit.adapt(base(TIME), case.recipe, **(LORA if case.sizes is None else case.sizes)).train()
        self.ids = torch.randint(0, TIME["vocab_size"], (TIME["rows"], TIME["tokens"]), generator=torch.Generator().manual_seed(2))
        self.tasks = next((h.tasks for h in hooks if h.tasks), 0)
        self.batch = {"input_ids": self.ids, "labels": self.ids}
        self.step = stack.enter_context(hooked(self.model, torch.optim.AdamW, hooks, lr=1e-4, total=total, held=[self.batch]))
        self.forwards = 0
        self.model.register_forward_pre_hook(self._count)

    def _count(self, module, args) -> None:
        self.forwards += 1

    def __call__(self) -> None:
        if self.tasks:
            self.step.backward([self.model(input_ids=x, labels=x).loss / self.tasks for x in self.ids.chunk(self.tasks)])
        else:
            self.step.loss(self.batch).backward()
        self.step()

    def timed(self) -> float:
        begun = time.perf_counter()
        self()
        return time.perf_counter() - begun

    def counted(self) -> dict[str, int]:
        self.forwards = 0
        with FlopCounterMode(display=False) as flops, Count() as calls:
            self()
        return {"forwards": self.forwards, "flops": flops.get_total_flops(), "calls": calls.n}


def one(name: str, rounds: int) -> dict[str, Any]:
    """What is measured of a hook: ratios of its steps to those without it, ordinary ones and those in which it acts; the counts of an ordinary one."""
    case, total = CASES[name], WARM + rounds + 2 * EVERY
    quiet = next(t for t in range(WARM + rounds, total) if not case.acts(t, total))
    ordinary, acting, plain = [], [], []
    with ExitStack() as stack:
        loops = [Loop(case, hooks, total, stack) for hooks in ([], [build({name: dict(case.options)})])]
        for t in range(quiet):
            took = {n: loops[n].timed() for n in ((0, 1) if t % 2 else (1, 0))}
            if t >= WARM:
                plain.append(took[0])
                (acting if case.acts(t, total) else ordinary).append(took[1] / took[0])
        counts = [loop.counted() for loop in loops]
    return {"hook": name, "on": case.recipe, "seconds": statistics.median(plain), "ordinary": ordinary, "acting": acting,
            "without": counts[0], "with": counts[1]}


def why(row: dict[str, Any]) -> str:
    """What one ordinary step does more than without the hook."""
    a, b = row["without"], row["with"]
    out = [f"{b['forwards']} forward passes for {a['forwards']}"] if b["forwards"] != a["forwards"] else []
    out += [f"{b['flops'] / a['flops'] - 1:+.0%} matrix operations"] if abs(b["flops"] / a["flops"] - 1) > 0.005 else []
    out += [f"{b['calls'] / a['calls'] - 1:+.0%} operator calls"] if abs(b["calls"] / a["calls"] - 1) > 0.005 else []
    return ", ".join(out) or "none"


def ratio(some: list[float]) -> tuple[str, str]:
    """Median, quartiles."""
    if not some:
        return "", ""
    low, _, high = statistics.quantiles(some, n=4, method="inclusive") if len(some) > 1 else [some[0]] * 3
    return f"{statistics.median(some):.2f}", f"{low:.2f} – {high:.2f}" if len(some) > 1 else "once"


def page(rows: list[dict[str, Any]], rounds: int, command: str) -> str:
    over = [r["hook"] for r in rows if statistics.median(r["ordinary"]) > AIM]
    heads = ("hook", "on", "ordinary step", "quartiles", "step in which it acts", "quartiles", "what an ordinary step does more")
    lines = []
    for r in rows:
        first, spread = ratio(r["ordinary"])
        lines.append(f"| {r['hook']} | {r['on']} | {first}{'*' * (r['hook'] in over)} | {spread} | {' | '.join(ratio(r['acting']))} | {why(r)} |")
    return (f"<!-- made by {command} -->\n\n# What a hook adds to a step\n\nTime of a whole training step with the hook over that of the same adapter "
            f"without it: Llama, float32, 3 layers, width 512, MLP 1408, {TIME['rows']} x {TIME['tokens']} tokens, all linear layers, LoRA of rank 16, "
            f"or the method that the hook is for (`on`). {platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}, "
            f"{datetime.date.today()}; {rounds} rounds in turn in one process, the medians of their ratios. The aim is at most {AIM - 1:.0%} outside of "
            f"what a hook does only now and then (`*`: more). That work, every {EVERY} steps here and far more seldom in use, or once, has its own column. "
            "pcgrad, gradvac and cagrad part the same rows into two tasks, with a forward and a backward pass for each; lisa, dropbp, aflora and lora_fa "
            "leave work out.\n\n| " + " | ".join(heads) + " |\n|---|---|---:|---:|---:|---:|---|\n" + "\n".join(lines) + "\n\n"
            + (f"Above the aim: {', '.join(over)}.\n" if over else "None is above the aim.\n")
            + (f"Not measured: {', '.join(sorted(lost))}.\n" if (lost := set(HOOKS) - {r["hook"] for r in rows}) else ""))


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("--out", type=Path)
    args.add_argument("--json", type=Path)
    args.add_argument("--hooks", default=",".join(CASES), help="names with commas between")
    args.add_argument("--rounds", type=int, default=48)
    args.add_argument("--threads", type=int, default=1)
    given = args.parse_args()
    torch.set_num_threads(given.threads)
    if lost := [n for n in given.hooks.split(",") if n not in CASES]:
        sys.exit(f"no such hook: {lost[0]}; known are {', '.join(CASES)}")
    rows = []
    for name in given.hooks.split(","):
        rows.append(one(name, given.rounds))
        print(json.dumps(rows[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    text = page(rows, given.rounds, "python -m benchmarks.overhead")
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
