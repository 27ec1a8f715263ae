"""Time and memory of combining adapters: lorakit in the factors beside PEFT's `add_weighted_adapter` and a dense decomposition.

    python -m benchmarks.mix --out docs/mix-speed.md

Every cell is a process of its own: time is the processor time of the one call, memory is what the call adds to the process's peak. All with
one thread, random factors, float32. A cell that takes longer than --limit seconds of processor time ends there. --rows keeps what is finished
for the next start.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

SHAPES = {"1B: 2048×2048 + 5632×2048 + 2048×5632": [(2048, 2048), (5632, 2048), (2048, 5632)],
          "7B: 4096×4096": [(4096, 4096)], "7B: 11008×4096": [(11008, 4096)]}
ONE, SQUARE, WIDE = SHAPES
CELLS = [(ONE, 2, "svd"), (ONE, 2, "ties_svd"), (ONE, 2, "dare_ties_svd"), (ONE, 3, "svd"), (SQUARE, 2, "svd"), (WIDE, 2, "svd"), (SQUARE, 2, "ties_svd")]
KINDS = {"svd": {}, "ties_svd": {"density": 0.2}, "dare_ties_svd": {"density": 0.5}}
WAYS = ("PEFT", "dense SVD", "lorakit")
RANK = 16


def one(way: str, kind: str, shapes: list, n: int, limit: float) -> dict[str, float]:
    """Seconds and bytes of one combination of n adapters."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    names, weights = [f"a{k}" for k in range(n)], [0.6, 0.4, 0.3][:n]
    model = nn.ModuleDict({f"l{k}": nn.Linear(i, o, bias=False) for k, (o, i) in enumerate(shapes)})
    if way == "PEFT":
        import peft as library
    else:
        import lorakit.compat.peft as library
    wrapped = library.get_peft_model(model, library.LoraConfig(r=RANK, target_modules=list(model)), names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, library.LoraConfig(r=RANK, target_modules=list(model)))
    with torch.no_grad():
        for k, p in wrapped.named_parameters():
            if "lora_B" in k:
                p.normal_()
    factors = [[tuple(dict(wrapped.named_parameters())[f"base_model.model.l{k}.lora_{x}.{name}{'.weight' if way == 'PEFT' else ''}"].detach() for x in "BA")
                for name in names] for k in range(len(shapes))]
    torch.linalg.svd(torch.randn(64, 64))
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + limit) + 1, resource.RLIM_INFINITY))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way == "dense SVD":
            for some in factors:
                U, S, V = torch.linalg.svd(sum(w * (B @ A) for w, (B, A) in zip(weights, some, strict=True)), full_matrices=False)
                U[:, :RANK] * S[:RANK], V[:RANK]
        else:
            wrapped.add_weighted_adapter(names, weights, "mix", kind, **KINDS[kind])
    seconds = time.process_time() - start
    return {"seconds": seconds, "bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024}


def cell(way: str, kind: str, shapes: list, n: int, limit: float) -> dict[str, float] | None:
    """The same in a process of its own; None where it took too long."""
    command = [sys.executable, "-m", "benchmarks.mix", "--limit", str(limit), "--one", json.dumps([way, kind, shapes, n])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode == -signal.SIGXCPU:
        return None
    done.check_returncode()
    return json.loads(done.stdout.strip().splitlines()[-1])


def page(rows: list[dict], a: argparse.Namespace) -> str:
    import peft
    import torch

    def say(c: dict | None) -> str:
        return f"> {a.limit:g} s" if c is None else f"{c['seconds']:.3g} s, {c['bytes'] / 2**20:.0f} MiB"

    loads = [r["load"] for r in rows]
    lines = ["# Combining adapters: time and memory", "",
             f"Made by `python -m benchmarks.mix --limit {a.limit:g}` on {datetime.date.today()}: {platform.machine()}, {os.cpu_count()} cores, one thread, "
             f"other work on the machine (load {min(loads):.1f} to {max(loads):.1f}; times are processor time), torch {torch.__version__}, "
             f"PEFT {peft.__version__}. Adapters of rank {RANK} made one of rank {RANK}; each cell is a process of its own; "
             "memory is what the call adds to its peak.", "",
             "`svd` stays in the factors: a QR of each stack and a decomposition of its size. The others act on every number of the update, so that it has "
             "to be formed; its nearest of the rank comes from the eigenvectors of the smaller of D Dᵀ and Dᵀ D. PEFT decomposes with "
             "`svd_full_matrices=True`, its default.", "",
             "| shapes | adapters | combination | PEFT | dense SVD | lorakit | PEFT / lorakit |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        theirs, ours = r["PEFT"], r["lorakit"]
        ratio = 0.0 if ours is None else (a.limit if theirs is None else theirs["seconds"]) / ours["seconds"]
        times = "" if ours is None else f"{'> ' if theirs is None else ''}{ratio:{',.0f' if ratio >= 100 else '.2g'}}×"
        dense = say(r["dense SVD"]) if "dense SVD" in r else ""
        lines.append(f"| {r['shapes']} | {r['n']} | {r['kind']} | {say(theirs)} | {dense} | {say(ours)} | {times} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--one", help=argparse.SUPPRESS)
    ap.add_argument("--limit", type=float, default=300)
    ap.add_argument("--rows", type=Path)
    ap.add_argument("--out", type=Path)
    a = ap.parse_args()
    if a.one:
        print(json.dumps(one(*json.loads(a.one), a.limit)))
        return
    rows = [json.loads(line) for line in a.rows.read_text(encoding="utf-8").splitlines()] if a.rows and a.rows.is_file() else []
    for label, n, kind in CELLS:
        row = {"shapes": label, "n": n, "kind": kind}
        if any(row.items() <= r.items() for r in rows):
            continue
        row["load"] = os.getloadavg()[0]
        for way in WAYS if kind == "svd" else (WAYS[0], WAYS[2]):
            row[way] = cell(way, kind, SHAPES[label], n, a.limit)
        rows.append(row)
        if a.rows:
            a.rows.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        if a.out:
            a.out.write_text(page(rows, a), encoding="utf-8")
    print(page(rows, a))


if __name__ == "__main__":
    main()
