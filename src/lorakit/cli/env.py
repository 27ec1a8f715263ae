"""lorakit env: what a bug report needs.

    lorakit env --json
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Annotated

import typer

from lorakit.cli.app import app, out


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False) -> None:
    """Versions, threads, memory and devices."""
    import torch

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    packages = ("lorakit", "torch", "transformers", "safetensors", "numpy", "accelerate", "datasets", "peft", "trl", "bitsandbytes", "torchao")
    info = {p: version(p) for p in packages} | {
        "python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1) if hasattr(os, "sysconf") else None,
        "cuda": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] or "none"}
    out.print(json.dumps(info, indent=2) if as_json else "\n".join(f"{k}: {v}" for k, v in info.items()), markup=False)
