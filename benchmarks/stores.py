"""What quantised bases cost: bytes, memory while loading, error, and time of a product beside bitsandbytes and torchao.

    python -m benchmarks.stores --out docs/stores.md

Every load is a process of its own; its peak is the process's highest resident size less that after the imports alone. Products are timed in
processor time with one thread, all ways in turn, round after round; medians, and half the distance between the quartiles.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

WAYS = {"float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"}, "int8": {"quantize": "int8"}, "nf4": {"quantize": "nf4"},
        "nf4 without double quantisation": {"quantize": {"name": "nf4", "double_quant": False}}, "nf3": {"quantize": "nf3"}, "nf2": {"quantize": "nf2"}}
MODELS = {"stories260k": "stories260k/hf-llama-fp32", "craftgpt-5m (GPT-2)": "craftgpt-5m/hf-gpt2-fp16",
          "craftgpt-5m (OPT)": "craftgpt-5m/hf-opt-fp16"}
SCHEMES = ("int8", "int7", "int6", "int5", "nf4", "int4", "nf3", "int3", "nf2", "int2")
SHAPES = ((2048, 2048), (5632, 2048))
TOKENS = (1, 16, 512)
PLAIN = "lorakit nf4 (PyTorch)"  # the same layer where bitsandbytes does not make the numbers
OURS = {"lorakit nf4": "nf4", PLAIN: "nf4", "lorakit nf3": "nf3", "lorakit nf2": "nf2", "lorakit int8": "int8", "lorakit int4": "int4"}
THEIRS = ("bitsandbytes nf4", "bitsandbytes int8", "torchao int8")
MIB = 1 << 20


def options(how: str) -> dict:
    return {"dtype": "float32"} | WAYS[how]


def highest() -> int:
    """Highest resident bytes of this process; ru_maxrss would count its parent's too, from before the program was changed."""
    told = Path("/proc/self/status")
    if told.is_file():
        return next(int(line.split()[1]) for line in told.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one_load(path: str, how: str) -> dict[str, float]:
    """Bytes of the base, its numbers, and what loading adds to the process's peak."""
    import torch
    import transformers  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import lorakit.quantized.hub  # noqa: F401
    from lorakit.models import load_base

    torch.set_num_threads(1)
    before = highest()
    model = load_base(path, **options(how))
    peak = highest() - before
    every = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    return {"bytes": sum(every.values()), "peak": peak}


def load(path: str, how: str) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.stores", "--load", path, how]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.strip().splitlines()[-1])


def large(at: str, layers: int) -> None:
    """A folder with a Llama of TinyLlama's shape and random weights, in bfloat16, in parts of 200 MB."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4)
    with torch.device("cpu"):
        tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(at, max_shard_size="200MB")


def numbers(path: str) -> tuple[int, int]:
    """Numbers of a model, and those of the weights that `quantize` packs."""
    import torch
    import transformers as tf
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lorakit.quantized import own_weights
    from lorakit.targets import select

    with FakeTensorMode():
        model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.from_pretrained(path), dtype=torch.float32)
        modules = dict(model.named_modules())
        return sum(p.numel() for p in model.parameters()), sum(modules[p].weight.numel() for p in own_weights(model, select(model, "all-linear")))


def memory_table(folders: dict[str, str]) -> list[str]:
    """Bytes of the base predicted and measured, and the peak while loading."""
    from lorakit.errors import LorakitError
    from lorakit.planning.memory import memory

    out = ["| model | base | bytes per parameter | base, MiB | predicted, MiB | peak while loading, MiB | peak less base, MiB |",
           "|---|---|---|---|---|---|---|"]
    for name, path in folders.items():
        n, inside = numbers(path)
        for how in WAYS:
            got = load(path, how)
            try:
                want = f"{memory(path, None, batch=1, length=1, **options(how)).base / MIB:.2f}"
            except LorakitError as e:
                want = f"not planned: {str(e).partition(';')[0]}"
            out.append(f"| {name}, {n:,} numbers ({inside / n:.0%} packed) | {how} | {got['bytes'] / n:.3f} | {got['bytes'] / MIB:.2f} | {want} | "
                       f"{got['peak'] / MIB:.1f} | {(got['peak'] - got['bytes']) / MIB:.1f} |")
    return out


def error_table() -> list[str]:
    """Relative error on Gaussian weights, and bits a weight."""
    import torch

    from lorakit.stores.scheme import scheme_of

    M = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    out = ["| scheme | bits a weight | relative error |", "|---|---|---|"]
    for given in [*SCHEMES, {"name": "nf4", "double_quant": False}, {"name": "nf4", "block": 128}, {"name": "int4", "group": 32}]:
        s = scheme_of(given)
        error = float((s.matrix(s.parts(M), *M.shape, torch.float32) - M).norm() / M.norm())
        out.append(f"| {given if isinstance(given, str) else ', '.join(f'{k}: {v}' for k, v in given.items())} | {8 * s.bytes(*M.shape) / M.numel():.3f} | "
                   f"{error:.4f} |")
    return out


def layers(out_features: int, in_features: int, dtype) -> dict:
    """Every way to keep the same layer, in training mode."""
    import torch
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from torch import nn
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    import lorakit

    torch.manual_seed(0)
    size = {"in_features": in_features, "out_features": out_features, "bias": False}
    dense = nn.Linear(**size).to(dtype)
    state = dense.state_dict()
    out = {"dense": dense}
    for name, scheme in OURS.items():
        m = nn.Sequential(nn.Linear(**size).to(dtype))
        m[0].load_state_dict(state)
        out[name] = lorakit.quantize(m, scheme, target_modules="0")[0]
    four = Linear4bit(in_features, out_features, bias=False, quant_type="nf4", compute_dtype=dtype)
    eight = Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
    four.load_state_dict(state)
    eight.load_state_dict(state)
    ao = nn.Sequential(nn.Linear(**size).to(dtype))
    ao[0].load_state_dict(state)
    quantize_(ao, Int8WeightOnlyConfig())
    out |= {"bitsandbytes nf4": four.to("cpu"), "bitsandbytes int8": eight.to("cpu"), "torchao int8": ao[0]}
    return {k: m.train().requires_grad_(False) for k, m in out.items()}


def product_times(rounds: int) -> list[tuple]:
    """[(shape, dtype, tokens, kind, {way: [milliseconds, …]}), …]"""
    import torch

    from lorakit.kernels import decode

    out = []
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        ways = layers(*shape, dtype)
        for tokens, kind in itertools.product(TOKENS, ("forward", "forward + backward")):
            x, g = torch.randn(tokens, shape[1], dtype=dtype), torch.randn(tokens, shape[0], dtype=dtype)
            times: dict[str, list[float]] = {k: [] for k in ways}
            for k in range(rounds + 2):
                for name, m in ways.items():
                    y = x.clone().requires_grad_(kind != "forward")
                    with mock.patch.object(decode, "operator", return_value=None) if name == PLAIN else nullcontext():
                        start = time.process_time()
                        z = m(y)
                        if kind != "forward":
                            z.backward(g)
                        took = time.process_time() - start
                    if k >= 2:  # the first two warm up
                        times[name].append(1000 * took)
            out.append((f"{shape[0]} × {shape[1]}", str(dtype).removeprefix("torch."), tokens, kind, times))
    return out


def shown(times: list[float]) -> str:
    low, _, high = statistics.quantiles(times, n=4)
    return f"{statistics.median(times):.2f} ± {(high - low) / 2:.2f}"


def time_tables(rows: list[tuple]) -> list[str]:
    """Medians of all ways, then ours against the best of theirs."""
    ways = list(rows[0][4])
    out = [f"| weight | dtype | tokens | | {' | '.join(ways)} |", "|" + "---|" * (len(ways) + 4)]
    out += [f"| {s} | {d} | {n} | {kind} | {' | '.join(shown(t[w]) for w in ways)} |" for s, d, n, kind, t in rows]
    out += ["", "Ours over theirs, median of the rounds' ratios (below 1: faster). 4 bits: NF4 beside bitsandbytes' NF4, then ours by PyTorch alone beside it. "
            "8 bits: int8 beside the better of bitsandbytes and torchao (torchao keeps a dense copy of the weight for the backward pass, the others make it "
            "again). Any: NF4 beside the best of all three. A miss is above 1.05 at 16 or 512 tokens.", "",
            "| weight | dtype | tokens | | 4 bits | 4 bits, PyTorch | 8 bits | any |", "|---|---|---|---|---|---|---|---|"]
    for s, d, n, kind, t in rows:
        mid = {w: statistics.median(v) for w, v in t.items()}
        pairs = [("lorakit nf4", "bitsandbytes nf4"), (PLAIN, "bitsandbytes nf4"), ("lorakit int8", min(("bitsandbytes int8", "torchao int8"), key=mid.get)),
                 ("lorakit nf4", min(THEIRS, key=mid.get))]
        ratios = [statistics.median(a / b for a, b in zip(t[ours], t[theirs], strict=True)) for ours, theirs in pairs]
        out.append(f"| {s} | {d} | {n} | {kind} | {' | '.join(f'{r:.2f}' + ' **miss**' * (n > 1 and r > 1.05) for r in ratios)} |")
    return out


def cpu() -> str:
    told = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in told.read_text().splitlines() if line.startswith("model name")] if told.is_file() else []
    return names[0] if names else platform.processor()


def page(folders: dict[str, str], depth: int, rounds: int) -> str:
    load_before = os.getloadavg()[0]
    times = time_tables(product_times(rounds))
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "transformers", "bitsandbytes", "torchao"))
    head = [
        "# Quantised bases: bytes, memory, error, time", "",
        f"Made by `python -m benchmarks.stores --layers {depth} --rounds {rounds}` on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}: {platform.machine()}, "
        f"{cpu()}, {os.cpu_count()} cores, one thread, load {load_before:.1f} from other work, {versions}.", "",
        "## Memory", "",
        "Linear layers but the head are packed; embeddings, norms and the head stay as they are (float32 here). Predicted: from the configuration alone, "
        "`lorakit.planning.memory`. Peak: highest resident size while loading, less that of the bare imports; pages of the checkpoint that are mapped count "
        f"too. The 1B shape is TinyLlama's (2048, 5632, 32 heads over 4) with {depth} of its 22 layers, random weights in bfloat16, in files of 200 MB.", "",
        *memory_table(folders), "",
        "## Error", "", "‖Q - W‖ / ‖W‖ for a Gaussian W (2048 × 2048).", "", *error_table(), "",
        "## Time of a product", "",
        f"Milliseconds of processor time, median of {rounds} rounds ± half the distance between the quartiles. All in training mode: in evaluation "
        "bitsandbytes lays its weight out anew and has no gradients any more (`lorakit.stores.bitsandbytes`). `lorakit nf4`: the numbers are made by "
        "bitsandbytes' operator, as they are where it is installed (`lorakit.kernels.decode`); `(PyTorch)`: where it is not.", "", *times, ""]
    return "\n".join(head)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--out", type=Path)
    p.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--load", nargs=2)
    a = p.parse_args()
    warnings.simplefilter("ignore")
    if a.load:
        print(json.dumps(one_load(*a.load)))
        return
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as at:
        large(at, a.layers)
        folders = {k: str(a.data / v) for k, v in MODELS.items() if (a.data / v / "config.json").is_file()} | {"1B shape": at}
        text = page(folders, a.layers, a.rounds)
    if a.out:
        a.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
