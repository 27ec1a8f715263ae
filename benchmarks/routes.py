"""What each route of merging into a quantised base keeps of a trained adapter.

    python -m benchmarks.routes ../shared/data --out docs/merge-routes.md

stories260k (a 260-thousand-parameter Llama that writes children's stories), its attention and the first matrices of its MLPs packed, learns
restaurant descriptions (E2E) by a LoRA, by the same LoRA trained merge-aware, and on whole numbers by QA-LoRA; each is then merged by every route that
takes it. The figure is the loss by the token on held-out descriptions.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lorakit
from benchmarks import seeds
from benchmarks.mix_tasks import write
from benchmarks.seeds import shown
from lorakit import host
from lorakit.errors import LorakitError
from lorakit.experiments import mixing
from lorakit.merges.routes import ROUTES
from lorakit.models import load_base, load_tokenizer
from lorakit.sites import site_at
from lorakit.training import config as c
from lorakit.training import run as r
from lorakit.training.measure import evaluate, evaluating

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]  # rows of 64: whole groups
BASES: dict[str, dict[str, Any]] = {"nf4": {"name": "nf4"}, "int4": {"name": "int4", "group": 32}}
ADAPTERS: dict[str, dict[str, Any]] = {"LoRA": {"method": "lora"}, "merge-aware LoRA": {"method": "lora", "merge_aware": True},
                                       "QA-LoRA": {"method": "qa-lora", "group": 32}}
FORCED = {"requantize": {"force": True}}


class Row(NamedTuple):
    """A merged model: the share of the update that is in it, its logits' distance from the trained model's, its loss, its size."""

    share: float
    distance: float
    loss: float
    size: int


@torch.no_grad()
def weights(model: torch.nn.Module, paths: list[str]) -> list[torch.Tensor]:
    """The matrices in effect, adapters included."""
    state, slots, modules = host.find_state(model), host.slots(model), dict(model.named_modules())
    return [slots[p].map(state.active).weight() if p in slots else (s := site_at(modules, p)).view(s.store.read(torch.float32)) for p in paths]


def merged(model: torch.nn.Module, base: torch.nn.Module, held: Any, ids: torch.Tensor) -> dict[str, Row]:
    """Route -> what is left of the active adapter; the first row is the adapter itself, unmerged."""
    paths = list(host.slots(model))
    before, trained = weights(base, paths), weights(model, paths)
    with evaluating(model):
        want, plain = model(ids).logits, base(ids).logits
    whole = sum(float((V - W).double().square().sum()) for V, W in zip(trained, before, strict=True))

    def row(now: torch.nn.Module) -> Row:
        here = zip(weights(now, paths), trained, before, strict=True)
        share = sum(float(((N - W) * (V - W)).double().sum()) for N, V, W in here) / whole
        with evaluating(now):
            distance = float((now(ids).logits - want).norm() / (want - plain).norm())
        size = sum(t.nbytes for t in [*now.parameters(), *now.buffers()])
        return Row(share, distance, evaluate(now, held)["eval_loss"], size)

    out = {"as trained": row(model)}
    for route in ROUTES:
        try:
            out[route] = row(lorakit.merged(model, route, **FORCED.get(route, {})))
        except LorakitError:
            continue  # exact is for updates that are constant over the base's groups
    return out


def one(a: argparse.Namespace, seed: int, tmp: Path) -> dict[tuple[str, str, str], Row]:
    """(base, adapter, route) -> what is left: data, start and order anew from one seed."""
    raw = str(a.data / "stories260k" / "hf-llama-fp32")
    texts = (a.data / "e2e" / "valid.txt").read_text(encoding="utf-8").splitlines()
    random.Random(seed).shuffle(texts)
    test, file = write(tmp / "held.jsonl", texts[: a.heldout]), write(tmp / "rows.jsonl", texts[a.heldout : a.heldout + 8 * a.steps])
    out = {}
    for name, scheme in BASES.items():
        lorakit.quantize(load_base(raw), scheme, target_modules=TARGETS).save_pretrained(tmp / name)
        load_tokenizer(raw).save_pretrained(tmp / name)
        held, base = mixing.prepared(str(tmp / name), {"train": test, "max_length": 128}), load_base(tmp / name)
        ids = torch.tensor([[*t["input_ids"], *[0] * 64][:64] for t in held.heldout.rows[:8]])
        out[name, "none", ""] = Row(0.0, 1.0, evaluate(base, held)["eval_loss"], sum(t.nbytes for t in [*base.parameters(), *base.buffers()]))
        for adapter, options in ADAPTERS.items():
            if adapter == "QA-LoRA" and name == "nf4":
                continue  # no zero points to go into
            at = tmp / f"{name} {adapter}"
            r.train(c.parse({"base": str(tmp / name), "adapter": {"r": a.rank, "target_modules": TARGETS, **options}, "eval": {"samples": 0},
                             "data": {"train": file, "max_length": 128, "eval_fraction": 0}, "output": str(at),
                             "train": {"batch_size": 8, "max_steps": a.steps, "learning_rate": a.rate, "threads": 1, "lr_scheduler_type": "cosine",
                                       "seed": seed}}), say=lambda s: None)
            model = lorakit.load(load_base(tmp / name), at / "adapter")
            for route, left in merged(model, base, held, ids).items():
                out[name, adapter, route] = left
                print(seed, name, adapter, route, *left, flush=True)
    return out


def page(got: list[dict[tuple[str, str, str], Row]], a: argparse.Namespace) -> str:
    lines = ["# Merging into a quantised base", "",
             f"Made by `python -m benchmarks.routes DATA --steps {a.steps} --seeds {a.seeds}` {a.machine}.", "", *(__doc__ or "").strip().splitlines()[4:], "",
             f"Rank {a.rank}, {a.steps} steps of 8 descriptions, learning rate {a.rate:g} for all, no tuning; nf4 in blocks of 64, int4 and QA-LoRA in groups "
             f"of 32. Mean ± half of the 95 % interval over {a.seeds} seeds, each with its own data and start. *Kept*: the share of the trained update "
             "that is in the weights, <merged - base, update> / |update|². *Logits*: how far they are from the trained model's, as a part of how far training "
             "moved them. *Size*: parameters and constants of the merged model. `exact` takes only updates that are constant over the base's groups; "
             "`requantize` is forced, where it would refuse an update that it loses.", "",
             "| base | adapter | route | kept | logits | loss | size |", "|---|---|---|---:|---:|---:|---:|"]
    for key in got[0]:
        rows, (base, adapter, route) = [g[key] for g in got], key
        cells = [shown([x[n] for x in rows]) for n in range(3)] if route else ["", "", shown([x.loss for x in rows])]
        lines.append(f"| {base} | {adapter} | {f'`{route}`' if route in ROUTES else route} | " + " | ".join(cells)
                     + f" | {sum(x.size for x in rows) / len(rows) / 1024:.0f} KiB |")
    for base in BASES:
        gaps = [g[base, "merge-aware LoRA", "requantize"].loss - g[base, "LoRA", "requantize"].loss for g in got]
        lines += ["", f"On {base}, requantised: the loss of the merge-aware LoRA less that of the plain one, seed by seed: {shown(gaps, '+')}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    seeds.run(__doc__, one, page, steps=60, rank=8, rate=5e-3, heldout=96, seeds=3)
