"""CraftGPT learns CLINC150's banking intents: lorakit and PEFT with the same data, settings and seeds.

    python examples/clinc150.py ../shared/data/clinc150 build/clinc
    python -m benchmarks.clinc150_vs_peft --seeds 3 --out docs/results.md
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Trainer

import lorakit
from lorakit import host
from lorakit.models import load_base
from lorakit.training import config as c
from lorakit.training import data as d
from lorakit.training import run as r
from lorakit.training.measure import evaluating, exact_match, token_loss


def one(library: str, run: c.Run) -> dict[str, float]:
    """Final exact match, held-out loss and training seconds of one library with one seed."""
    p = r.prepare(run)
    transformers.set_seed(run.train.seed)
    model = load_base(run.base.path, dtype=run.base.dtype)
    if library == "peft":
        model = get_peft_model(model, LoraConfig(r=run.adapter["r"], lora_alpha=run.adapter["lora_alpha"], target_modules="all-linear"))
    else:
        lorakit.adapt(model, run.spec())
        assert host.slots(model)
    args = r.arguments(run, len(p.train.rows))
    args.save_strategy, args.disable_tqdm = "no", True
    trainer = (Trainer if library == "peft" else lorakit.training.AdapterTrainer)(
        model=model, args=args, train_dataset=r._Rows(p.train.rows), data_collator=d.Collator(p.tokenizer.pad_token_id))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    with evaluating(model):
        return {"exact match": exact_match(model, p), "loss": token_loss(model, p.heldout.rows, p.tokenizer.pad_token_id, 64), "seconds": seconds,
                "trainable": sum(q.numel() for q in model.parameters() if q.requires_grad)}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--config", default="examples/clinc150.yaml")
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--set", action="append", default=[], dest="sets", metavar="KEY=VALUE")
    ap.add_argument("--out", type=Path)
    a = ap.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, float]]] = {"lorakit": [], "peft": []}
    for seed in range(a.seeds):
        for library in rows:
            with tempfile.TemporaryDirectory() as tmp:
                run = c.read(a.config, [*a.sets, f"train.seed={seed}", f"output={tmp}"])
                rows[library].append(one(library, run))
                print(library, seed, rows[library][-1], flush=True)
    lines = ["# CraftGPT 5M → CLINC150 banking, 10 utterances per intent, LoRA r 8", "",
             f"`python -m benchmarks.clinc150_vs_peft --seeds {a.seeds}{''.join(f' --set {s}' for s in a.sets)}`, {datetime.date.today()}, "
             f"{platform.machine()} 1 thread, torch {torch.__version__}, peft {peft.__version__}, lorakit {lorakit.__version__}. "
             f"Settings: {a.config}. 450 test utterances, greedy answers; ± is the standard deviation over seeds.", "",
             "| library | exact match, mean ± sd | each seed | held-out loss | training seconds | trainable |", "|---|---|---|---|---|---|"]
    for library, got in rows.items():
        em = [g["exact match"] for g in got]
        sd = statistics.stdev(em) if len(em) > 1 else float("nan")
        lines.append(f"| {library} | {statistics.mean(em):.1%} ± {sd:.1%} | {', '.join(f'{e:.1%}' for e in em)} "
                     f"| {statistics.mean(g['loss'] for g in got):.3f} | {statistics.median(g['seconds'] for g in got):.0f} | {got[0]['trainable']:,} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if a.out:
        a.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
