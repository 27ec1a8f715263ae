"""The plan as a picture: one bar a method, its parts at the moment of the peak."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorakit.planning.memory import Memory

PARTS = ("base", "adapter", "gradients", "optimizer")


def draw(rows: Mapping[str, Memory], path: str | Path, limit: int | None = None) -> None:
    """Writes a picture (its ending says the kind: .png, .svg, .pdf); `limit` is drawn as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(rows)[::-1]
    fig, ax = pyplot.subplots(figsize=(8, 1.2 + 0.42 * len(names)), layout="constrained")
    left = [0.0] * len(names)
    for part in (*PARTS, "activations and the rest of the step"):
        sizes = [max(0, rows[n].peak - sum(getattr(rows[n], p) for p in PARTS)) if part not in PARTS else getattr(rows[n], part) for n in names]
        ax.barh(names, [s / 2**20 for s in sizes], left=left, label=part, height=0.62)
        left = [a + s / 2**20 for a, s in zip(left, sizes, strict=True)]
    for y, n in enumerate(names):
        ax.text(left[y], y, f" {rows[n].peak / 2**20:,.0f} MiB", va="center", fontsize=8)
    if limit:
        ax.axvline(limit / 2**20, color="black", linestyle="--", linewidth=1)
        ax.text(limit / 2**20, len(names) - 0.45, " what there is", fontsize=8)
    ax.set_xlim(0, 1.18 * max([*left, (limit or 0) / 2**20]))
    ax.set_xlabel("MiB at the peak of one training step")
    ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    fig.savefig(path, dpi=150)
    pyplot.close(fig)
