"""What adapters cost by the number of layers: attach, switch, delete, save, load; lorakit beside PEFT on the same modules.

    python -m benchmarks.scale --out docs/scale.md
    python -m benchmarks.scale --layers 100 1000 --peft-limit 60

Each library and size runs in a process of its own. PEFT has --peft-limit seconds for all of a size; what it did not finish, or not reach, is
`not in … s`.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

WIDTH, RANK = 8, 4
NAMES = ["q_proj", "v_proj", "up_proj", "down_proj"]
OPS = {"attach 1st": "attach the 1st adapter", "attach 2nd": "attach the 2nd", "attach 10th": "attach the 10th", "switch": "switch the active one",
       "delete": "delete one of ten", "save": "save one", "load": "load one"}
VALUES = ("save", "load")  # what needs them, so not on the meta device


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp, self.norm = Attention(), MLP(), nn.LayerNorm(WIDTH)


class Decoder(nn.Module):
    """Blocks of four linear layers each, named as in a transformer; 8 x 8, so that numbers cost nothing and modules are what counts."""

    def __init__(self, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers // 4))

    def forward(self, x):
        for b in self.layers:
            x = x + b.self_attn.v_proj(b.self_attn.q_proj(b.norm(x)))
            x = x + b.mlp.down_proj(b.mlp.up_proj(x))
        return x


class Model(nn.Module):
    def __init__(self, layers: int):
        super().__init__()
        self.model = Decoder(layers)

    def forward(self, x):
        return self.model(x)


def build(layers: int, device: str) -> nn.Module:
    """The same model for the same number of layers."""
    torch.manual_seed(0)
    with torch.device(device):
        return Model(layers)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def often(run: Callable[[], object], undo: Callable[[], object] | None = None, most: int = 5, budget: float = 3.0) -> float:
    """Median over as many runs as fit into the budget, at least one."""
    got: list[float] = []
    while not got or (len(got) < most and sum(got) + got[-1] < budget):
        if got and undo:
            undo()
        got.append(seconds(run))
    return statistics.median(got)


class Lorakit:
    def __init__(self, model: nn.Module):
        import lorakit

        self.it, self.model = lorakit, model

    def attach(self, name: str) -> None:
        self.it.adapt(self.model, "lora", name=name, r=RANK, target_modules=NAMES)

    def switch(self, name: str) -> None:
        self.it.activate(self.model, name)

    def delete(self, name: str) -> None:
        self.it.delete(self.model, name)

    def save(self, name: str, path: Path) -> None:
        self.it.save(self.model, path, name)

    def load(self, name: str, path: Path) -> None:
        self.it.load(self.model, path, name)


class Peft:
    def __init__(self, model: nn.Module):
        import peft

        warnings.simplefilter("ignore")
        self.it, self.model = peft, model

    def attach(self, name: str) -> None:
        config = self.it.LoraConfig(r=RANK, target_modules=NAMES)
        if isinstance(self.model, self.it.PeftModel):
            self.model.add_adapter(name, config)
        else:
            self.model = self.it.get_peft_model(self.model, config, adapter_name=name)

    def switch(self, name: str) -> None:
        self.model.set_adapter(name)

    def delete(self, name: str) -> None:
        self.model.delete_adapter(name)

    def save(self, name: str, path: Path) -> None:
        self.model.save_pretrained(path, selected_adapters=[name])

    def load(self, name: str, path: Path) -> None:
        self.model.load_adapter(path / "a1", name)


LIBRARIES = {"lorakit": Lorakit, "peft": Peft}


def measure(library: str, layers: int, device: str) -> None:
    """Prints a line of JSON after every measurement, so that a limit loses only what it cut off."""
    torch.set_num_threads(1)
    kind = LIBRARIES[library]
    kind(nn.Module())  # imports
    model = kind(build(layers, device))

    def say(op: str, took: float) -> None:
        print(json.dumps({"op": op, "seconds": took}), flush=True)

    def fresh() -> None:
        nonlocal model
        model = kind(build(layers, device))
        gc.collect()

    say("attach 1st", often(lambda: model.attach("a1"), fresh))
    say("attach 2nd", often(lambda: model.attach("a2"), lambda: model.delete("a2")))
    say("switch", often(lambda: model.switch("a1"), lambda: model.switch("a2"), most=21))
    if device == "cpu":
        with tempfile.TemporaryDirectory() as tmp:
            model.switch("a1")
            say("save", often(lambda: model.save("a1", Path(tmp))))
            say("load", often(lambda: model.load("b", Path(tmp)), lambda: model.delete("b")))
            model.delete("b")
    for n in range(3, 10):
        model.attach(f"a{n}")
    say("attach 10th", often(lambda: model.attach("a10"), lambda: model.delete("a10")))
    say("delete", often(lambda: model.delete("a10"), lambda: model.attach("a10")))


def one(library: str, layers: int, device: str, limit: float | None) -> dict[str, float]:
    """Op -> seconds of one library in a process of its own; what the limit cut off is missing."""
    command = [sys.executable, "-m", "benchmarks.scale", "--measure", library, str(layers), device]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
        said = out.stdout
        if out.returncode:
            raise SystemExit(f"{' '.join(command)}\n{out.stderr[-3000:]}")
    except subprocess.TimeoutExpired as e:
        said = (e.stdout or b"").decode()
    return {row["op"]: row["seconds"] for row in map(json.loads, (line for line in said.splitlines() if line.startswith("{")))}


def show(took: float | None, limit: float | None) -> str:
    if took is None:
        return f"not in {limit:g} s"
    return f"{took * 1e6:.0f} µs" if took < 1e-3 else f"{took * 1e3:.3g} ms" if took < 1 else f"{took:.3g} s"


def machine() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return f"{names[0] if names else platform.machine()}, 1 thread"


def table(sizes: list[int], limit: float, device: str, say: Callable[[str], None]) -> list[str]:
    ops = [op for op in OPS if device == "cpu" or op not in VALUES]
    got = {}
    for n in sizes:
        for library in LIBRARIES:
            got[library, n] = one(library, n, device, limit if library == "peft" else None)
            say(f"{device} {library} {n}: " + ", ".join(f"{op} {show(got[library, n].get(op), limit)}" for op in ops))
    head = [f"{n:,} {library}" for n in sizes for library in LIBRARIES]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
    for op in ops:
        lines.append(f"| {OPS[op]} | " + " | ".join(show(got[library, n].get(op), limit) for n in sizes for library in LIBRARIES) + " |")
    return lines


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--layers", type=int, nargs="+", default=[100, 1000, 12288, 50000])
    ap.add_argument("--peft-limit", type=float, default=180.0, metavar="SECONDS")
    ap.add_argument("--devices", nargs="+", default=["cpu", "meta"], choices=["cpu", "meta"])
    ap.add_argument("--out", type=Path)
    ap.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.measure:
        return measure(a.measure[0], int(a.measure[1]), a.measure[2])
    import peft

    import lorakit

    words = " ".join(f"--{k} {' '.join(map(str, getattr(a, k)))}" for k in ("layers", "devices") if getattr(a, k) != ap.get_default(k))
    command = f"python -m benchmarks.scale{' ' + words if words else ''}{f' --peft-limit {a.peft_limit:g}' if a.peft_limit != 180 else ''}"
    lines = ["# Cost by the number of layers", "",
             f"`{command}`, {datetime.date.today()}, {machine()}, Python {platform.python_version()}, torch {torch.__version__}, peft {peft.__version__}, "
             f"lorakit {lorakit.__version__}.", "",
             f"Linear layers of {WIDTH} x {WIDTH}, four to a block, all adapted with LoRA r {RANK}: modules count, not numbers. Medians over up to five "
             f"runs (21 of the switch) within three seconds, or one. PEFT had {a.peft_limit:g} s for all of a size, in this order: attach the 1st, the "
             "2nd, switch, save, load, attach the 10th, delete; what it did not finish, or not reach, in that time says so. lorakit's save reads "
             "back what it wrote, loads it beside the model and compares; PEFT's only writes."]
    for device in a.devices:
        lines += ["", f"## {'Layers on the CPU' if device == 'cpu' else 'Layers on the meta device'}", "",
                  *table(a.layers, a.peft_limit, device, lambda line: print(line, file=sys.stderr, flush=True))]
    text = "\n".join(lines) + "\n"
    print(text)
    if a.out:
        a.out.write_text(text, encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
