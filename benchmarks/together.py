"""Many adapters on one base: trained at once beside one after the other, and a mixed batch beside one adapter's.

    python -m benchmarks.together --out docs/together.md

Training: K LoRAs of rank 8 with learning rates of their own on the embedded model, the same rows, the same steps; the losses must agree. Decoding: one
token for each of 32 rows of a random Llama (6 layers, width 512), every row with an adapter of its own, beside all rows with one adapter, and PEFT's
mixed batch on the same; in turn, medians of ratios.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch

import lorakit
from lorakit.models import load_base
from lorakit.training.together import together

warnings.filterwarnings("ignore")


def batches(seed: int, vocabulary: int, rows: int, length: int) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, vocabulary, (rows, length), generator=g) for _ in range(4)]
    return [{"input_ids": i, "labels": i} for i in ids]


def training(k: int, rows: int, length: int, steps: int, times: int = 3) -> tuple[float, float, float, float]:
    """(seconds one after the other, seconds at once, their ratio: medians; largest relative difference of a loss)."""
    told = [_training(k, rows, length, steps) for _ in range(times)]
    return (*(statistics.median(t[n] for t in told) for n in (0, 1)), statistics.median(t[0] / t[1] for t in told), max(t[2] for t in told))


def _training(k: int, rows: int, length: int, steps: int) -> tuple[float, float, float]:
    model = load_base("embedded")
    names = [f"a{n}" for n in range(k)]
    for n, name in enumerate(names):
        lorakit.adapt(model, "lora", r=8, name=name, seed=n)
    data = {name: batches(n, model.config.vocab_size, rows, length) for n, name in enumerate(names)}
    rates = {name: 1e-3 * (1 + n / k) for n, name in enumerate(names)}
    apart, at_once = copy.deepcopy(model), copy.deepcopy(model)
    begun = time.perf_counter()
    one = {}
    for name in names:
        one |= together(apart, {name: data[name]}, steps=steps, learning_rate={name: rates[name]})
    middle = time.perf_counter()
    both = together(at_once, data, steps=steps, learning_rate=rates)
    end = time.perf_counter()
    gap = max(abs(a / b - 1) for n in names for a, b in zip(both[n], one[n], strict=True))
    return middle - begun, end - middle, gap


def decoding(rounds: int) -> dict[str, float]:
    """Median ratio of a step with 32 adapters to one with one adapter: ours, and PEFT's."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=512, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8)
    torch.manual_seed(0)
    ours = LlamaForCausalLM(config).eval()
    theirs = copy.deepcopy(ours)
    names = [f"a{n}" for n in range(32)]
    for name in names:
        lorakit.adapt(ours, "lora", r=8, name=name)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=8, target_modules="all-linear"), adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, peft.LoraConfig(r=8, target_modules="all-linear"))
    ids = torch.randint(0, 512, (32, 1))
    theirs.eval()

    def timed(call) -> float:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun

    out: dict[str, list[float]] = {"ours": [], "peft": []}
    with torch.no_grad():
        for _ in range(rounds):
            lorakit.activate(ours, "a0")
            ours(ids)
            one = min(timed(lambda: ours(ids)) for _ in range(3))
            with lorakit.rows(ours, names):
                ours(ids)
                many = min(timed(lambda: ours(ids)) for _ in range(3))
            theirs.set_adapter("a0")
            theirs(ids)
            first = min(timed(lambda: theirs(ids)) for _ in range(3))
            mixed = min(timed(lambda: theirs(ids, adapter_names=names)) for _ in range(3))
            out["ours"].append(many / one)
            out["peft"].append(mixed / first)
    return {k: statistics.median(v) for k, v in out.items()}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("--out", type=Path)
    args.add_argument("--steps", type=int, default=5)
    args.add_argument("--rounds", type=int, default=15)
    given = args.parse_args()
    torch.set_num_threads(1)
    mixed, lines = decoding(given.rounds), []  # first, in memory that no training has cut up
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        for k, rows, length in ((16, 1, 16), (16, 1, 64), (16, 2, 128), (4, 1, 64)):
            a, b, ratio, gap = training(k, rows, length, given.steps)
            lines.append(f"| {k} | {rows} x {length} | {threads} | {a:.2f} | {b:.2f} | {ratio:.2f} | {gap:.1e} |")
            print(lines[-1], flush=True)
    text = ("<!-- made by python -m benchmarks.together -->\n\n# Many adapters at once\n\n"
            f"{platform.machine()}, torch {torch.__version__}, {datetime.date.today()}.\n\n## Trained at once\n\nLoRA, rank 8, all linear layers "
            f"of the embedded model (4.5M parameters), {given.steps} steps, medians of three; aim: 3 times as fast at 16.\n\n"
            "| adapters | rows x tokens of each | threads | one after the other, s | at once, s | ratio | largest relative difference of a loss |\n"
            "|---:|---|---:|---:|---:|---:|---:|\n" + "\n".join(lines) + "\n\n## A mixed batch\n\nOne token for each of 32 rows, 32 adapters of rank 8, "
            f"Llama of 6 layers and width 512, one thread: {mixed['ours']:.2f} times one adapter's step (aim: 1.2); PEFT {mixed['peft']:.2f} times its own.\n")
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
