"""What a method costs over the frozen model: time and bytes saved for the backward pass, beside PEFT on the same weights and tokens.

    python -m benchmarks.price --out docs/performance.md
    python -m benchmarks.price --only bytes --methods lora,dora

The floor: everything frozen, the gradient flows from the embeddings' output to the loss. PEFT's adapter is saved and loaded into lorakit, so that both have
the same numbers; a method's figures count only where the two losses agree to 1e-3. Times: floor, lorakit and PEFT in turn in one process, medians of the
rounds' ratios. Saved bytes: exact, each storage once, without the model's own tensors.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorakit
from lorakit.planning.memory import counting_saved

warnings.filterwarnings("ignore")
TIME = {"num_hidden_layers": 3, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "vocab_size": 1024, "rows": 4, "tokens": 128}
BYTES = {"num_hidden_layers": 8, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "vocab_size": 4096, "rows": 2, "tokens": 128}
ALL = "all-linear"
METHODS: dict[str, tuple[str, dict[str, Any], float | None, float | None]] = {  # PEFT's class, its options, aims: time over the floor, MiB saved
    "lora": ("LoraConfig", {"r": 16, "target_modules": ALL}, 1.10, 117),
    "lora, dropout 0.05": ("LoraConfig", {"r": 16, "lora_dropout": 0.05, "target_modules": ALL}, 1.13, 119),
    "dora": ("LoraConfig", {"r": 16, "use_dora": True, "target_modules": ALL}, 1.17, 145),
    "adalora": ("AdaLoraConfig", {"init_r": 16, "target_r": 8, "total_step": 100, "target_modules": ALL}, 1.13, 118),
    "vera": ("VeraConfig", {"r": 256, "target_modules": ALL}, 1.12, None),
    "loha": ("LoHaConfig", {"r": 8, "target_modules": ALL}, 1.5, 130),
    "lokr": ("LoKrConfig", {"r": 8, "target_modules": ALL}, 1.25, 122),
    "oft": ("OFTConfig", {"oft_block_size": 32, "r": 0, "target_modules": ALL}, 1.10, None),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "target_modules": ["q_proj", "v_proj"]}, 1.25, 110),
    "hra": ("HRAConfig", {"r": 8, "target_modules": ["q_proj", "v_proj"]}, 1.15, 100),
    "fourierft": ("FourierFTConfig", {"n_frequency": 1000, "target_modules": ALL}, 1.2, None),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, None, None),
    "vblora": ("VBLoRAConfig", {"r": 4, "vector_length": 64, "num_vectors": 60, "target_modules": ALL}, None, None),
    "miss": ("MissConfig", {"r": 16, "target_modules": ALL}, None, None),
}


def base(shape: dict[str, int]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {k: v for k, v in shape.items() if k not in ("rows", "tokens")}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=shape["num_attention_heads"])).requires_grad_(False).train()


def both(name: str, shape: dict[str, int]) -> tuple[nn.Module, nn.Module]:
    """The method on two copies of one model, ours with PEFT's numbers."""
    import peft

    cls, options, *_ = METHODS[name]
    torch.manual_seed(1)
    theirs = peft.get_peft_model(base(shape), getattr(peft, cls)(task_type="CAUSAL_LM", **copy.deepcopy(options)))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.01)
    with tempfile.TemporaryDirectory() as tmp:
        theirs.save_pretrained(tmp)
        ours = lorakit.load(base(shape), tmp, trainable=True, check_base=False)
    return ours, theirs.train()


def call(model: nn.Module, shape: dict[str, int]) -> Callable[[], torch.Tensor]:
    """A forward pass from the embeddings' output, which wants its gradient."""
    ids = torch.randint(0, shape["vocab_size"], (shape["rows"], shape["tokens"]), generator=torch.Generator().manual_seed(2))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)

    def forward() -> torch.Tensor:
        torch.manual_seed(3)
        logits = model(inputs_embeds=embedded).logits  # the loss is made here: PEFT's AdaLoRA adds its own term to the model's
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return forward


def saved(model: nn.Module, shape: dict[str, int]) -> int:
    forward = call(model, shape)
    with counting_saved(model) as found:
        forward()
    return sum(found.values())


def step(forward: Callable[[], torch.Tensor], model: nn.Module) -> float:
    model.zero_grad(set_to_none=True)
    begun = time.perf_counter()
    forward().backward()
    return time.perf_counter() - begun


def one(name: str, only: str, rounds: int) -> dict[str, Any]:
    """What is measured of a method."""
    out: dict[str, Any] = {"method": name}
    for what, shape in (("bytes", BYTES), ("time", TIME)):
        if only not in ("", what):
            continue
        floor, (ours, theirs) = base(shape), both(name, shape)
        for m in (ours, theirs):
            m.eval()
        gap = abs(float(call(ours, shape)()) / float(call(theirs, shape)()) - 1)
        out["gap"] = max(gap, out.get("gap", 0.0))
        for m in (ours, theirs):
            m.train()
        if what == "bytes":
            out["bytes"] = [saved(m, shape) for m in (floor, ours, theirs)]
            continue
        runs = [(call(m, shape), m) for m in (floor, ours, theirs)]
        for forward, m in runs:
            step(forward, m)
        told = [[step(*run) for run in runs] for _ in range(rounds)]
        out["time"] = [statistics.median(r[0] for r in told), *(statistics.median(r[k] / r[0] for r in told) for k in (1, 2)),
                       statistics.median(r[2] / r[1] for r in told)]
        out["spread"] = statistics.quantiles([r[1] / r[0] for r in told], n=4)[::2]
    return out


def page(rows: list[dict[str, Any]], rounds: int) -> str:
    mib = 2**20
    head = ("<!-- made by python -m benchmarks.price -->\n\n# What a method costs over the frozen model\n\nLlama, float32, all linear layers (BOFT and HRA: "
            f"q and v). {platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}, {datetime.date.today()}; "
            f"`python -m benchmarks.price`, {rounds} rounds in turn. Aims in brackets, `*` where one is missed, or PEFT costs less.\n\n"
            "Time: 3 layers, width 512, MLP 1408, 4 x 128 tokens. Saved for the backward pass: 8 layers, width 768, MLP 2048, vocabulary 4096, 2 x 128 "
            "tokens.\n\n| method | time over the floor | quartiles | PEFT's | PEFT / lorakit | saved, MiB | PEFT's | losses differ by |\n"
            "|---|---:|---:|---:|---:|---:|---:|---:|\n")
    lines, ratios = [], []
    for r in rows:
        *_, aim, most = METHODS[r["method"]]
        cells = [r["method"]]
        if "time" in r:
            ours, theirs, ratio = r["time"][1:]
            ratios.append(ratio)
            cells += [f"{ours:.2f}" + (f" [{aim}]" if aim else "") + ("*" if (aim and ours > aim) or theirs < ours / 1.03 else ""),
                      f"{r['spread'][0]:.2f} to {r['spread'][1]:.2f}", f"{theirs:.2f}", f"{ratio:.2f}"]
        else:
            cells += ["", "", "", ""]
        if "bytes" in r:
            ours, theirs = (b / mib for b in r["bytes"][1:])
            cells += [f"{ours:.1f}" + (f" [{most}]" if most else "") + ("*" if (most and ours > most) or ours > theirs * 1.001 else ""), f"{theirs:.1f}"]
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join([*cells, f"{r['gap']:.0e}"]) + " |")
    floors = [f"The floor saves {rows[0]['bytes'][0] / mib:.1f} MiB."] if "bytes" in rows[0] else []
    if ratios:
        floors.append(f"Geometric mean of PEFT / lorakit: {statistics.geometric_mean(ratios):.2f} (aim 1.2); "
                      f"the floor's step takes {rows[0]['time'][0] * 1e3:.0f} ms.")
    return head + "\n".join(lines) + "\n\n" + " ".join(floors) + "\n"


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("--out", type=Path)
    args.add_argument("--json", type=Path)
    args.add_argument("--methods", default=";".join(METHODS), help="names with semicolons between")
    args.add_argument("--only", choices=("bytes", "time"), default="")
    args.add_argument("--rounds", type=int, default=15)
    args.add_argument("--threads", type=int, default=1)
    given = args.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for name in given.methods.split(";"):
        if name not in METHODS:
            sys.exit(f"no such method: {name}; known are {', '.join(METHODS)}")
        try:
            row = one(name, given.only, given.rounds)
        except (ValueError, RuntimeError, TypeError) as e:
            print(f"{name}: left out: {type(e).__name__}: {e}", file=sys.stderr)
            continue
        if row["gap"] > 1e-3:
            print(f"{name}: the losses differ by {row['gap']:.1e}, so its figures say nothing", file=sys.stderr)
            continue
        rows.append(row)
        print(json.dumps(row), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    text = page(rows, given.rounds)
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
