"""What a method costs over the frozen model: time and bytes saved for the backward pass, beside PEFT on the same weights and tokens.

    python -m benchmarks.price --out docs/performance.md
    python -m benchmarks.price --only bytes --methods "lora;dora"

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
WIDE = TIME | {"num_hidden_layers": 1, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
LORA, DORA = ("LoraConfig", {"r": 16, "target_modules": ALL}), ("LoraConfig", {"r": 16, "use_dora": True, "target_modules": ALL})
METHODS: dict[str, tuple[str, dict[str, Any], float | None, float | None]] = {  # PEFT's class, its options, aims: time over the floor, MiB saved
    "lora": (*LORA, 1.10, 117),
    "lora, dropout 0.05": ("LoraConfig", {"r": 16, "lora_dropout": 0.05, "target_modules": ALL}, 1.13, 119),
    "dora": (*DORA, 1.17, 145),
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
OTHERWISE: dict[str, tuple[str, dict[str, Any], float | None, dict[str, Any]]] = {  # PEFT's class, its options, aim: time over the floor, what is otherwise
    "lora, one block of width 2048": (*LORA, 1.05, WIDE),
    "dora, one block of width 2048": (*DORA, 1.08, WIDE),
    "lokr, one block of width 2048": ("LoKrConfig", {"r": 8, "target_modules": ALL}, 1.08, WIDE),
    "loha r 4, one block of width 2048": ("LoHaConfig", {"r": 4, "target_modules": ALL}, 1.10, WIDE),
    "lora r 8": ("LoraConfig", {"r": 8, "target_modules": ALL}, None, {}),
    "lora r 32": ("LoraConfig", {"r": 32, "target_modules": ALL}, None, {}),
    "lora r 128": ("LoraConfig", {"r": 128, "target_modules": ALL}, None, {}),
    "dora r 128": ("LoraConfig", {"r": 128, "use_dora": True, "target_modules": ALL}, None, {}),
    "lora, bfloat16 base": (*LORA, None, {"dtype": "bfloat16"}),
    "dora, bfloat16 base": (*DORA, None, {"dtype": "bfloat16"}),
    "lora, gradient checkpointing": (*LORA, None, {"checkpointing": True}),
    "dora, gradient checkpointing": (*DORA, None, {"checkpointing": True}),
    "lora, torch.compile": (*LORA, None, {"compile": True}),
    "dora, torch.compile": (*DORA, None, {"compile": True}),
}
APART = ("rows", "tokens", "dtype", "checkpointing", "compile")
HALF = 0.55  # of what PEFT adds to the floor's saved bytes, on a bfloat16 base


def base(shape: dict[str, Any]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {k: v for k, v in shape.items() if k not in APART}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=shape["num_attention_heads"])).requires_grad_(False).train()
    if shape.get("checkpointing"):
        model.gradient_checkpointing_enable()
    return model.to(getattr(torch, shape.get("dtype", "float32")))


def both(name: str, shape: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """The method on two copies of one model, ours with PEFT's numbers."""
    import peft

    cls, options, *_ = (METHODS | OTHERWISE)[name]
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


def call(model: nn.Module, shape: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """A forward pass from the embeddings' output, which wants its gradient."""
    ids = torch.randint(0, shape["vocab_size"], (shape["rows"], shape["tokens"]), generator=torch.Generator().manual_seed(2))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    run = torch.compile(model) if shape.get("compile") else model

    def forward() -> torch.Tensor:
        torch.manual_seed(3)
        logits = run(inputs_embeds=embedded).logits  # the loss is made here: PEFT's AdaLoRA adds its own term to the model's
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    return forward


def saved(model: nn.Module, shape: dict[str, Any]) -> int:
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
    otherwise = OTHERWISE[name][3] if name in OTHERWISE else {}
    for what, shape in (("bytes", BYTES | otherwise), ("time", TIME | otherwise)):
        if only not in ("", what) or (what == "bytes" and shape.get("compile")):  # what a compiled graph saves is not asked of these hooks
            continue
        floor, (ours, theirs) = base(shape), both(name, shape)
        for m in (ours, theirs):
            m.eval()
        plain = shape | {"compile": False}
        gap = abs(float(call(ours, plain)()) / float(call(theirs, plain)()) - 1)
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


def times(r: dict[str, Any], aim: float | None) -> list[str]:
    if "time" not in r:
        return [""] * 4
    ours, theirs, ratio = r["time"][1:]
    missed = (aim and round(ours, 2) > aim) or ratio < 1 / 1.03
    return [f"{ours:.2f}" + f" [{aim}]" * bool(aim) + "*" * bool(missed), f"{r['spread'][0]:.2f} to {r['spread'][1]:.2f}", f"{theirs:.2f}", f"{ratio:.2f}"]


def page(rows: list[dict[str, Any]], left: dict[str, str], given: argparse.Namespace) -> str:
    mib = 2**20
    head = ("<!-- made by python -m benchmarks.price -->\n\n# What a method costs over the frozen model\n\nLlama, float32, all linear layers (BOFT and HRA: "
            f"q and v). {platform.machine()}, {given.threads} thread, torch {torch.__version__}, {datetime.date.today()}; "
            f"`python -m benchmarks.price`, {given.rounds} rounds in turn, medians of the rounds' ratios. Aims in brackets; `*`: an aim is missed, it saves "
            "more than PEFT, or is more than 3 % slower.\n\n"
            "Time: 3 layers, width 512, MLP 1408, 4 x 128 tokens. Saved for the backward pass: 8 layers, width 768, MLP 2048, vocabulary 4096, 2 x 128 "
            "tokens.\n\n![time and saved bytes over the floor](performance.png)\n\n"
            "| method | time over the floor | quartiles | PEFT's | PEFT / lorakit | saved, MiB | PEFT's | losses differ by |\n"
            "|---|---:|---:|---:|---:|---:|---:|---:|\n")
    out, mine = head, [r for r in rows if r["method"] in METHODS]
    for r in mine:
        *_, aim, most = METHODS[r["method"]]
        cells = [r["method"], *times(r, aim), "", ""]
        if "bytes" in r:
            ours, theirs = (b / mib for b in r["bytes"][1:])
            cells[5:] = [f"{ours:.1f}" + f" [{most}]" * bool(most) + "*" * bool((most and ours > most) or ours > theirs * 1.001), f"{theirs:.1f}"]
        out += "| " + " | ".join([*cells, f"{r['gap']:.0e}"]) + " |\n"
    floors = [f"The floor saves {mine[0]['bytes'][0] / mib:.1f} MiB."] if mine and "bytes" in mine[0] else []
    if ratios := [r["time"][3] for r in mine if "time" in r]:
        floors.append(f"Geometric mean of PEFT / lorakit: {statistics.geometric_mean(ratios):.2f} (aim 1.2); "
                      f"the floor's step takes {mine[0]['time'][0] * 1e3:.0f} ms.")
    out += "\n" + " ".join(floors) + "\n"
    if others := [r for r in rows if r["method"] in OTHERWISE]:
        out += ("\n## Other ranks, widths and ways to run\n\nThe same two shapes but for what the name says (a block of width 2048: MLP 5632, 4 x 128 tokens, "
                f"for both figures). Bytes: what is added to the floor's; on a bfloat16 base with float32 factors the aim is {HALF} of what PEFT adds.\n\n"
                "| configuration | time over the floor | quartiles | PEFT's | PEFT / lorakit | added, MiB | PEFT adds | share | losses differ by |\n"
                "|---|---:|---:|---:|---:|---:|---:|---:|---:|\n")
        for r in others:
            aim, how = OTHERWISE[r["method"]][2:]
            cells = [r["method"], *times(r, aim), "", "", ""]
            if "bytes" in r:
                ours, theirs = ((b - r["bytes"][0]) / mib for b in r["bytes"][1:])
                half = HALF if "dtype" in how else None
                missed = ours > theirs * (half or 1.001)
                cells[5:] = [f"{ours:.1f}", f"{theirs:.1f}", (f"{ours / theirs:.2f}" if theirs else "") + f" [{half}]" * bool(half) + "*" * missed]
            out += "| " + " | ".join([*cells, f"{r['gap']:.0e}"]) + " |\n"
    return out + ("\nLeft out:\n\n" + "".join(f"- {name}: {why}\n" for name, why in left.items()) if left else "")


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of what is added to the floor: time in percent of it, and MiB; lorakit over PEFT."""
    from matplotlib.figure import Figure

    rows = [r for r in rows if r["method"] in METHODS and "time" in r and "bytes" in r][::-1]
    figure = Figure(figsize=(9, 0.6 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    at = range(len(rows))
    added = [("time added to the frozen model's, %", [[100 * (r["time"][k] - 1) for r in rows] for k in (1, 2)]),
             ("MiB added to what it saves for the backward pass", [[(r["bytes"][k] - r["bytes"][0]) / 2**20 for r in rows] for k in (1, 2)])]
    for ax, (label, (ours, theirs)) in zip(axes, added, strict=True):
        for values, up, colour, who in ((ours, 0.2, "#2563a8", "lorakit"), (theirs, -0.2, "#b9c0c8", "PEFT")):
            ax.barh([n + up for n in at], values, height=0.38, color=colour, label=who)
        ax.set_xlabel(label)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(list(at), [r["method"] for r in rows])
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    known = METHODS | OTHERWISE
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("--out", type=Path, help="the page; its picture lies beside it")
    args.add_argument("--json", type=Path)
    args.add_argument("--methods", default=";".join(known), help="names with semicolons between")
    args.add_argument("--only", choices=("bytes", "time"), default="")
    args.add_argument("--rounds", type=int, default=15)
    args.add_argument("--threads", type=int, default=1)
    given = args.parse_args()
    torch.set_num_threads(given.threads)
    rows, left = [], {}
    for name in given.methods.split(";"):
        if name not in known:
            sys.exit(f"no such method: {name}; known are {', '.join(known)}")
        try:
            row = one(name, given.only, given.rounds)
        except (ValueError, RuntimeError, TypeError, lorakit.LorakitError) as e:
            left[name] = f"{type(e).__name__}: {str(e).splitlines()[0]}"
        else:
            if row.get("gap", 0.0) > 1e-3:
                left[name] = f"the losses differ by {row['gap']:.1e}, so its figures say nothing"
            elif len(row) > 1:
                rows.append(row)
        print(json.dumps(row) if name not in left else f"{name}: left out: {left[name]}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    text = page(rows, left, given)
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")
        picture(rows, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
