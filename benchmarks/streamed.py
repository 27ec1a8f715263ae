"""Memory and time of a merged checkpoint: weight by weight beside PEFT's `merge_and_unload` and `save_pretrained`; and of checkpoints mixed.

    python -m benchmarks.streamed --out docs/streamed-merge.md

A checkpoint of random weights in the shape of Llama-3.2-1B (16 layers, width 2048, bfloat16, tied embeddings) is written in shards to --folder, and a
LoRA of rank 16 on all its linear layers. Every way is a process of its own: its peak is the highest resident size (VmHWM), and what of it came after the
imports. About 10 GB of disk, given back at the end. --layers takes a smaller model.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 1 << 20
SHAPE = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
         "tie_word_embeddings": True, "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 500000.0}
RANK, SHARD = 16, 1000 << 20
WAYS = {"lorakit, streamed": "lorakit.merge_checkpoint(base, adapter, out)", "PEFT": "merge_and_unload(), save_pretrained()",
        "lorakit, two mixed": 'lorakit.mix_checkpoints([merged, other], out, "ties", base=base)'}


def write_model(folder: Path, layers: int, seed: int) -> None:
    """Random weights under the names of transformers, in shards."""
    import torch
    from safetensors.torch import save_file

    from lorakit.models import skeleton

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}), encoding="utf-8")
    gen, shards, names = torch.Generator().manual_seed(seed), [{}], {}
    for name, t in skeleton(folder).named_parameters():  # tied ones once
        if sum(x.nbytes for x in shards[-1].values()) + 2 * t.numel() > SHARD and shards[-1]:
            _write_shard(folder, shards, names, save_file)
        shards[-1][name] = torch.empty(t.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=gen)
    _write_shard(folder, shards, names, save_file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")


def _write_shard(folder: Path, shards: list[dict], names: dict[str, str], save_file) -> None:
    file = f"model-{len(shards):05d}.safetensors"
    save_file(shards[-1], str(folder / file), metadata={"format": "pt"})
    names.update(dict.fromkeys(shards[-1], file))
    shards[-1].clear()
    shards.append({})


def write_adapter(base: Path, folder: Path) -> None:
    """A LoRA of random factors on every linear layer but the head, as a PEFT folder."""
    import torch

    from lorakit.formats.folder import Folder, Part
    from lorakit.formats.peft_folder import write
    from lorakit.methods.lora import LoRA
    from lorakit.models import skeleton

    layers = {n: m for n, m in skeleton(base).named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    parts = {n: Part(LoRA(RANK, 2.0 * RANK), {"A": torch.randn(RANK, m.in_features) * 0.01, "B": torch.randn(m.out_features, RANK) * 0.01})
             for n, m in layers.items()}
    folder.mkdir()
    write(Folder.held(folder, parts, base_model_name_or_path=str(base), task_type="CAUSAL_LM"), folder, None)


def one(way: str, at: Path) -> dict[str, float]:
    """Peak and time of one way in this process."""
    import torch
    import transformers

    torch.set_num_threads(1)
    base, adapter, out = (at / n for n in ("base", "adapter", {"PEFT": "peft", "lorakit, streamed": "merged", "lorakit, two mixed": "mixed"}[way]))
    shutil.rmtree(out, ignore_errors=True)
    if way == "PEFT":
        import peft
    else:
        import lorakit
        from lorakit.models import skeleton

        skeleton(base)
    before, start, cpu = _peak(), time.perf_counter(), time.process_time()
    if way == "PEFT":
        model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
        model.merge_and_unload().save_pretrained(out, max_shard_size=SHARD)
    elif way == "lorakit, streamed":
        lorakit.merge_checkpoint(base, adapter, out)
    else:
        lorakit.mix_checkpoints([at / "merged", at / "other"], out, "ties", base=base)
    return {"peak": _peak(), "grown": _peak() - before, "seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}


def _peak() -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) / 1024


def differ(a: Path, b: Path) -> tuple[float, float]:
    """|A - B| / |B| over all tensors, and the share of the numbers that differ at all."""
    from lorakit.merges.streamed import entries

    one, other = entries(a), entries(b)
    assert one.keys() == other.keys()
    gap = size = 0.0
    count = every = 0
    for name in one:
        x, y = one[name].read().float(), other[name].read().float()
        gap, size = gap + float((x - y).double().square().sum()), size + float(y.double().square().sum())
        count, every = count + int((x != y).sum()), every + x.numel()
    return (gap / size) ** 0.5, count / every


def page(rows: dict[str, dict], a: argparse.Namespace, shards: list[float], largest: float, gap: tuple[float, float]) -> str:
    import peft
    import torch
    import transformers

    ours, theirs, mixed = (rows[w] for w in WAYS)
    same = "equal to the bit" if not gap[1] else (f"{gap[0]:.1e} of their norm apart, in {gap[1]:.2%} of the numbers: sums made in another order, rounded to "
                                                  "bfloat16")
    lines = ["# A merged checkpoint without the model: memory and time", "",
             f"Made by `python -m benchmarks.streamed --layers {a.layers}` on {datetime.date.today()}: {platform.machine()}, {os.cpu_count()} cores, one "
             f"thread, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}.", "",
             f"The base is a checkpoint of random weights in the shape of Llama-3.2-1B: {a.layers} layers, width 2048, bfloat16, {sum(shards):,.0f} MiB in "
             f"{len(shards)} shards, the largest of {max(shards):,.0f} MiB. The adapter is a LoRA of rank {RANK} on all linear layers. Each way is a process "
             "of its own; peak is its highest resident size, libraries included, and *grown* what came after they were imported.", "",
             "| way | call | peak, MiB | grown, MiB | grown / largest shard | seconds | processor seconds |", "|---|---|---|---|---|---|---|"]
    for way, r in rows.items():
        lines.append(f"| {way} | `{WAYS[way]}` | {r['peak']:,.0f} | {r['grown']:,.0f} | {r['grown'] / max(shards):.2f} | {r['seconds']:.1f} | {r['cpu']:.1f} |")
    lines += ["", f"On top of the libraries, PEFT's merge takes {theirs['grown'] / ours['grown']:.1f} times the memory of the streamed one and "
              f"{theirs['cpu'] / ours['cpu']:.2g} times its processor time. The two merged checkpoints are {same}.", "",
              f"Mixing needs a float32 matrix for each source and a few more, of the largest tensor (here the embedding, {largest:,.0f} MiB in float32): "
              f"{mixed['grown'] / largest:.1f} of them for two sources and their base, whatever the number of layers."]
    return "\n".join(lines) + "\n"


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    ap.add_argument("--layers", type=int, default=16)
    ap.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    ap.add_argument("--out", type=Path)
    a = ap.parse_args()
    if a.one:
        print(json.dumps(one(a.one[0], Path(a.one[1]))))
        return
    if (free := shutil.disk_usage(a.folder).free) < 14 << 30 and a.layers >= 16:
        raise SystemExit(f"{a.folder} has {free >> 30} GiB free; 14 are needed")
    with tempfile.TemporaryDirectory(dir=a.folder) as tmp:
        at = Path(tmp)
        write_model(at / "base", a.layers, 0)
        write_model(at / "other", a.layers, 1)
        write_adapter(at / "base", at / "adapter")
        rows = {}
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.streamed", "--one", way, tmp]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            if done.returncode:
                raise SystemExit(done.stderr)
            rows[way] = json.loads(done.stdout.strip().splitlines()[-1])
            print(way, rows[way], flush=True)
        text = page(rows, a, [f.stat().st_size / MIB for f in (at / "base").glob("*.safetensors")], SHAPE["vocab_size"] * SHAPE["hidden_size"] * 4 / MIB,
                    differ(at / "merged", at / "peft"))
    print(text)
    if a.out:
        a.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
