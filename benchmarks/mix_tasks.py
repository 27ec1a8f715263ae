"""Three adapters, each trained on a real task, mixed by every rule: what is left of each task.

    python -m benchmarks.mix_tasks ../shared/data --out docs/mix.md

stories260k (a 260-thousand-parameter Llama that writes children's stories) learns restaurant descriptions (E2E), Shakespeare and WikiText;
LoRAHub weighs the three on five utterances to an assistant (CLINC150), which none of them saw. The figure is the loss by the token.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import lorakit
from benchmarks import seeds
from benchmarks.seeds import shown
from lorakit.experiments import mixing
from lorakit.formats.folder import Folder, beside
from lorakit.merges import ROWS
from lorakit.merges.search import lorahub
from lorakit.merges.stats import COLLECT
from lorakit.models import load_base
from lorakit.training import config as c
from lorakit.training import run as r
from lorakit.training.measure import evaluate

TASKS = ("E2E", "Shakespeare", "WikiText")
UNSEEN = "CLINC150"
HALF = {"density": 0.5}
RULES = [("linear", {}, None), ("linear", {"normalize": True}, None), ("svd", {}, None), ("svd", {}, [1 / 3] * 3), ("byom", {}, None),
         ("magnitude-prune", HALF, None), ("ties", HALF, None), ("ties", HALF | {"scale": 1.5}, None), ("ties", HALF | {"scope": "global"}, None),
         ("knots-ties", HALF, None), ("dare-linear", HALF, None), ("dare-ties", HALF, None), ("della", {}, None), ("knots-dare-ties", HALF, None),
         ("breadcrumbs", HALF, None), ("model-stock", {}, None), ("regmean", {}, None), ("fisher", {}, None), ("peft-linear", {}, None),
         ("peft-ties", HALF, None), ("peft-ties-svd", HALF, None), ("peft-dare-ties", HALF, None)]


def texts(data: Path, seed: int) -> dict[str, list[str]]:
    """Pieces of about 300 letters of each task, in the seed's order."""
    corpora = data / "text-corpora"
    shakespeare = (corpora / "tinyshakespeare.txt").read_text(encoding="utf-8").split("\n\n")
    wiki = [line.strip() for a in json.loads((corpora / "wikitext_1000.json").read_text(encoding="utf-8")) for line in a.splitlines() if len(line) > 120]
    clinc = json.loads((data / "clinc150" / "data_full.json").read_text(encoding="utf-8"))["test"]
    out = {"E2E": (data / "e2e" / "valid.txt").read_text(encoding="utf-8").splitlines(),
           "Shakespeare": ["\n\n".join(shakespeare[n : n + 3]) for n in range(0, len(shakespeare) - 3, 3)], "WikiText": wiki, UNSEEN: [t for t, _ in clinc]}
    for some in out.values():
        random.Random(seed).shuffle(some)
    return {k: [t[:300] for t in v] for k, v in out.items()}


def write(path: Path, rows: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in rows), encoding="utf-8")
    return str(path)


def train(base: str, file: str, out: Path, steps: int, rank: int, seed: int) -> Path:
    """An adapter of all linear layers."""
    raw = {"base": base, "adapter": {"method": "lora", "r": rank}, "data": {"train": file, "max_length": 128, "eval_fraction": 0}, "eval": {"samples": 0},
           "train": {"batch_size": 8, "max_steps": steps, "learning_rate": 5e-3, "threads": 1, "lr_scheduler_type": "cosine", "seed": seed}, "output": str(out)}
    r.train(c.parse(raw), say=lambda s: None)
    return out / "adapter"


def one(a: argparse.Namespace, seed: int, tmp: Path) -> dict[str, tuple[Any, float | None, list[float]]]:
    """Row -> (rank, share of the norm left out, losses by task): everything anew from one seed, the held-out pieces included."""
    base = str(a.data / "stories260k" / "hf-llama-fp32")
    every, model = texts(a.data, seed), load_base(base, dtype="float32")
    held = {k: mixing.prepared(base, {"train": write(tmp / f"{k}-held.jsonl", v[: a.heldout]), "max_length": 128}) for k, v in every.items()}
    file = {k: write(tmp / f"{k}.jsonl", every[k][a.heldout : a.heldout + 8 * a.steps]) for k in TASKS}
    seen = {k: mixing.prepared(base, {"train": write(tmp / f"{k}-some.jsonl", every[k][a.heldout : a.heldout + 32]), "max_length": 128}) for k in TASKS}
    few = mixing.prepared(base, {"train": write(tmp / "few.jsonl", every[UNSEEN][a.heldout : a.heldout + 5]), "max_length": 128})
    alone = {k: train(base, file[k], tmp / k, a.steps, a.rank, seed) for k in TASKS}
    joint = write(tmp / "joint.jsonl", [t for k in TASKS for t in every[k][a.heldout : a.heldout + 8 * a.steps]])
    together = train(base, joint, tmp / "joint", 3 * a.steps, a.rank, seed)

    def losses(adapter: Path | None) -> list[float]:
        if adapter is None:
            return [evaluate(model, p)["eval_loss"] for p in held.values()]
        with beside(model, Folder(adapter)):
            return [evaluate(model, p)["eval_loss"] for p in held.values()]

    rows = {"the base": ("", None, losses(None)), **{f"{k} alone": (a.rank, None, losses(p)) for k, p in alone.items()},
            "joint training, three times the steps": (a.rank, None, losses(together))}
    stats = {what: [mixing.collect(model, str(alone[k]), seen[k], what) for k in TASKS] for what in COLLECT}
    for n, (rule, options, weights) in enumerate(RULES):
        needs = ROWS[rule][0].needs
        given = {"stats": stats[needs]} if needs else {}
        done = lorakit.mix(list(alone.values()), tmp / f"mix{n}", rule, weights=weights, **given, **options)
        how = ", ".join([f"{k} {v}" for k, v in options.items()] + ([f"weights {weights[0]:.2f}"] if weights else []))
        name = f"`{rule}`{f' ({how})' if how else ''}"
        rows[name] = (max(done.ranks.values()), done.error, losses(tmp / f"mix{n}"))
        print(seed, name, *rows[name], flush=True)
    names = [k.lower() for k in TASKS]
    for name, p in zip(names, alone.values(), strict=True):
        lorakit.load(model, p, name)
    found = lorahub(model, names, lambda m: evaluate(m, few)["eval_loss"])
    lorakit.detach(model)
    lorakit.mix(list(alone.values()), tmp / "lorahub", weights=found.weights)
    print(seed, "lorahub's weights", *found.weights, flush=True)
    rows["`lorahub`, from five utterances"] = (3 * a.rank, None, losses(tmp / "lorahub"))
    return rows


def page(got: list[dict[str, tuple[Any, float | None, list[float]]]], a: argparse.Namespace) -> str:
    columns = [*TASKS, UNSEEN, "mean of the three"]
    lines = ["# Three tasks mixed by every rule", "",
             f"Made by `python -m benchmarks.mix_tasks DATA --steps {a.steps} --seeds {a.seeds}` {a.machine}.", "",
             *(__doc__ or "").strip().splitlines()[4:], "",
             f"Each adapter: LoRA, rank {a.rank}, every linear layer, {a.steps} steps of 8 pieces of at most 128 tokens, learning rate 5e-3. Weights are 1 "
             f"unless a rule says otherwise; no tuning. Mean ± half of the 95 % interval over {a.seeds} seeds; a seed draws its own training data, its own "
             f"{a.heldout} held-out pieces of each task, starts and order, so that the intervals are of all of these: rows of one seed share them, and "
             "their differences are surer than the intervals say. \"Left out\" is the part of the merged update's norm that the result's rank has no room "
             "for. `slerp` goes between two adapters and is not here.", "",
             "| | rank | left out | " + " | ".join(columns) + " |", "|---|---:|---:|" + "---:|" * len(columns)]
    for name, (rank, error, _) in got[0].items():
        runs = [g[name][2] for g in got]
        left = "" if error is None else f"{sum(g[name][1] for g in got) / len(got):.1%}"
        cells = [shown([x[n] for x in runs]) for n in range(len(columns) - 1)] + [shown([sum(x[:3]) / 3 for x in runs])]
        lines.append(f"| {name} | {rank} | {left} | " + " | ".join(cells) + " |")
    gaps = [g["`lorahub`, from five utterances"][2][-1] - min(g[f"{k} alone"][2][-1] for k in TASKS) for g in got]
    lines += ["", f"LoRAHub's loss on {UNSEEN} less that of the best single adapter there, seed by seed: {shown(gaps, '+')}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    seeds.run(__doc__, one, page, steps=150, rank=8, heldout=48, seeds=3)
