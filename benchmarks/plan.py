"""`lorakit plan` beside what happens: memory and time of a training step, foretold from the configuration and measured on the real model.

    python -m benchmarks.plan --out docs/plan.md
    python -m benchmarks.plan --only memory

Each configuration runs in a process of its own. Measured: what autograd saves, the most bytes of tensors alive in a step (weights, gradients and
optimiser included), and the median time of a step of the whole model, all of its layers. Foretold time: models of one and two layers are timed,
the rest is extrapolated; both are timed in turn, `--rounds` times, and the medians compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

DATA = Path("../shared/data")
BASES = {"pylm": "embedded", "stories260k": str(DATA / "stories260k/hf-llama-fp32"), "craftgpt": str(DATA / "craftgpt-5m/hf-gpt2-fp16")}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("pylm", {"adapter": "lora", "r": 16}), ("pylm", {"adapter": "dora", "r": 16}), ("pylm", {"adapter": "lora-fa", "r": 16}),
    ("pylm", {"adapter": "vera"}), ("pylm", {"adapter": "oft"}), ("pylm", {"adapter": None}),
    ("pylm", {"adapter": "lora", "r": 16, "gradient_checkpointing": True}), ("pylm", {"adapter": "lora", "r": 16, "quantize": "nf4"}),
    ("pylm", {"adapter": "dora", "r": 16, "quantize": "int8"}), ("pylm", {"adapter": "lora", "r": 64, "lora_dropout": 0.05}),
    ("craftgpt", {"adapter": "lora", "r": 8}), ("craftgpt", {"adapter": "ia3"}), ("craftgpt", {"adapter": "lora", "r": 8, "quantize": "nf4"}),
    ("stories260k", {"adapter": "lora", "r": 8}), ("stories260k", {"adapter": "lokr", "r": 8}),
]
STEP = {"pylm": {"batch": 4, "length": 128}, "craftgpt": {"batch": 8, "length": 64}, "stories260k": {"batch": 8, "length": 128}}


def real(base: str, one: dict[str, Any]) -> torch.nn.Module:
    """The model itself, with random weights where only its sizes matter."""
    import transformers

    from lorakit import api
    from lorakit.models import where

    one = dict(one)
    adapter, scheme, again = one.pop("adapter"), one.pop("quantize", None), one.pop("gradient_checkpointing", False)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(where(base)), dtype=torch.float32).train()
    if scheme:
        api.quantize(model, scheme)
    if adapter:
        api.adapt(model, adapter, **one)
    if again:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def memory_of(name: str, one: dict[str, Any]) -> dict[str, Any]:
    """Bytes foretold, and bytes counted in a whole step of the real model with its optimiser."""
    from lorakit.planning import memory
    from lorakit.planning.memory import Live, counting_saved, labels_for

    told = memory(BASES[name], dtype="float32", **STEP[name], **one)
    model = real(BASES[name], one)
    ids = torch.ones(STEP[name]["batch"], STEP[name]["length"], dtype=torch.int64)
    with counting_saved(model) as saved:
        model(input_ids=ids, labels=labels_for(model, ids))
    own = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}.values())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    with Live(model) as live:
        for _ in range(2):  # in the second step the optimiser's state is there
            model(input_ids=ids, labels=labels_for(model, ids)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"saved": [told.saved, sum(saved.values())], "peak": [told.peak, own + live.peak]}


def time_of(name: str, one: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds of a step, foretold and measured in turn."""
    from lorakit.planning import seconds
    from lorakit.planning.duration import stepping

    told, took = [], []
    for _ in range(rounds):
        told.append(seconds(BASES[name], dtype="float32", at_least=0.7, **STEP[name], **one).step)
        step = stepping(real(BASES[name], one), STEP[name]["batch"], STEP[name]["length"])
        took.append(statistics.median([step() for _ in range(12)][2:]))
    return {"time": [statistics.median(told), statistics.median(took)]}


def child(what: str, n: int, rounds: int) -> dict[str, Any]:
    code = f"import json, torch; torch.set_num_threads(1); from benchmarks import plan as p; print(json.dumps(p.{what}_of(*p.CASES[{n}]" + (
        f", {rounds})))" if what == "time" else ")))")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def words(one: dict[str, Any]) -> str:
    rest = [f"{k} {v}" for k, v in one.items() if k != "adapter"]
    return ", ".join([one["adapter"] or "every weight", *rest])


def off(pair: list[float]) -> str:
    return f"{pair[0] / pair[1] - 1:+.1%}"


def page(rows: list[dict[str, Any]], rounds: int, minutes: float) -> str:
    head = ("<!-- made by python -m benchmarks.plan -->\n\n# A plan beside what happens\n\nMemory and time of one training step, foretold by `lorakit plan` "
            f"and measured. {platform.machine()}, 1 thread, torch {torch.__version__}, {datetime.date.today()}; medians of {rounds} rounds; "
            f"{minutes:.0f} minutes.\n\n"
            "| base | configuration | saved, MiB | off | peak, MiB | off | step, ms | off |\n|---|---|---:|---:|---:|---:|---:|---:|\n")
    mib = 2**20
    lines = [f"| {r['base']} | {r['words']} | {r['saved'][1] / mib:.1f} | {off(r['saved'])} | {r['peak'][1] / mib:.1f} | {off(r['peak'])} | "
             + (f"{r['time'][1] * 1e3:.0f} | {off(r['time'])} |" if "time" in r else "not timed | |") for r in rows]
    worst = {k: max(abs(r[k][0] / r[k][1] - 1) for r in rows if k in r) for k in ("saved", "peak", "time") if any(k in r for r in rows)}
    goals = {"saved": 0.01, "peak": 0.05, "time": 0.15}
    beyond = {k: sum(abs(r[k][0] / r[k][1] - 1) > goals[k] for r in rows if k in r) for k in worst}
    tail = "".join(f"- {k}: at most {w:.1%} off; {'every configuration' if not beyond[k] else f'all but {beyond[k]} of {len(rows)}'} within {goals[k]:.0%}.\n"
                   for k, w in worst.items())
    return head + "\n".join(lines) + "\n\n" + tail


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("--out", type=Path)
    args.add_argument("--only", choices=("memory", "time"))
    args.add_argument("--rounds", type=int, default=3)
    given, begun, rows = args.parse_args(), time.perf_counter(), []
    for n, (name, one) in enumerate(CASES):
        if not (BASES[name] == "embedded" or Path(BASES[name]).is_dir()):
            print(f"left out, as {BASES[name]} is not there: {name}, {words(one)}")
            continue
        row = {"base": name, "words": words(one)} | child("memory", n, 0) | (child("time", n, given.rounds) if given.only != "memory" else {})
        rows.append(row)
        print(row["base"], row["words"], *(f"{k} {off(row[k])}" for k in ("saved", "peak", "time") if k in row), sep="  ", flush=True)
    text = page(rows, given.rounds, (time.perf_counter() - begun) / 60)
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
