"""Where and when a comparison was made."""

from __future__ import annotations

import datetime
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lorakit.formats.receipt import versions


def describe(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Date, processor, memory, device and threads of the runs, versions. No name of a person or a host."""
    cpu, memory = platform.processor() or platform.machine(), None
    with suppress(OSError):
        cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), cpu)
    with suppress(OSError, ValueError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    good = [r for r in results if r["status"] == "ok"]
    return {"date": datetime.datetime.now().isoformat(timespec="seconds"), "cpu": cpu, "cores": os.cpu_count(), "memory_bytes": memory,
            "system": f"{platform.system()} {platform.machine()}", "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": sorted({r["threads"] for r in good if r.get("threads")}), "versions": versions()}
