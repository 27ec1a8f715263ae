"""What a mix did to its sources, target by target, as figures and as a picture.

Of the task vectors τ_t = w_t ΔW_t, weights in:

    sign agreement   share of the entries, among those where any is not 0, at which all that are not 0 have one sign
    interference     Σ of |τ_t| at entries where τ_t goes against sgn Σ τ, as a part of Σ |τ_t|: 0 none, 1/2 all cancels
    cosine           of every pair ΔW_s, ΔW_t, from the factors
    norm kept        |mix| / |Σ τ_t|: 1 for the plain sum
    present          <mix, ΔW_t> / |ΔW_t|² for each source: how much of it the mix holds along its own direction

The first two look at up to 256 evenly spaced rows of a target, so that no matrix of its size is formed; the others at all of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorakit.errors import extra
from lorakit.merges.base import Vector, cosines, gram

ROWS = 256
PANELS = (("sign_agreement", "sign agreement"), ("interference", "interference"), ("cosine", "mean cosine of pairs"), ("norm_kept", "norm kept"))


@torch.no_grad()
def row(vectors: Sequence[Vector], weights: Sequence[float], mix: Vector) -> dict[str, Any]:
    """The figures of one target."""
    G = gram([*vectors, mix])
    n, o = len(vectors), vectors[0].shape[-2]
    w = torch.tensor(weights, dtype=torch.float64)
    plain = float((w @ G[:n, :n] @ w).clamp_min(0).sqrt())
    at = torch.linspace(0, o - 1, min(ROWS, o)).round().long()
    T = torch.stack([v.rows(at) * k for v, k in zip(vectors, weights, strict=True)])
    signs = T.sign()
    some = (signs != 0).any(0)
    one = some & ~((signs > 0).any(0) & (signs < 0).any(0))
    size, against = float(T.abs().sum()), float((T.abs() * (signs * T.sum(0).sign() < 0)).sum())
    C = cosines(G)
    return {"sign_agreement": float(one.sum() / some.sum().clamp_min(1)), "interference": against / size if size else 0.0, "rows": [len(at), o],
            "cosines": C[:n, :n].tolist(), "cosine": float((C[:n, :n].sum() - C[:n, :n].diagonal().sum()) / (n * (n - 1))) if n > 1 else 1.0,
            "norm": float(G[n, n].clamp_min(0).sqrt()), "norms": G.diagonal()[:n].clamp_min(0).sqrt().tolist(),
            "norm_kept": float(G[n, n].clamp_min(0).sqrt()) / plain if plain else 0.0,
            "present": [float(G[n, t] / G[t, t]) if G[t, t] > 0 else 0.0 for t in range(n)]}


def overall(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Means over targets, each as one."""
    return {k: sum(r[k] for r in rows.values()) / max(len(rows), 1) for k, _ in PANELS}


def picture(rows: Mapping[str, Mapping[str, Any]], title: str, path: Path) -> None:
    """A heat map of each figure, blocks of the model downwards and kinds of layers across, as a PNG."""
    try:
        from matplotlib.figure import Figure  # without pyplot: a PNG is drawn by Agg, whatever backend is set
    except ImportError as e:
        raise extra("matplotlib", "train") from e
    at = {p: _place(p) for p in rows}
    blocks, kinds = (list(dict.fromkeys(a[n] for a in at.values())) for n in (0, 1))
    wide, high = 1.0 + 2.7 * len(PANELS), 1.9 + 0.22 * max(len(blocks), 3)
    fig = Figure(figsize=(wide, high), dpi=110, facecolor="white")
    fig.suptitle(title, fontsize=10)
    for n, (key, label) in enumerate(PANELS):
        grid = [[float("nan")] * len(kinds) for _ in blocks]
        for p, (b, k) in at.items():
            grid[blocks.index(b)][kinds.index(k)] = rows[p][key]
        ax = fig.add_axes(((0.6 + 2.7 * n) / wide, 1.2 / high, 1.9 / wide, 0.22 * max(len(blocks), 3) / high))
        bottom, top, colours = {"cosine": (-1, 1, "RdBu")}.get(key, (0, max(1.0, *(r[key] for r in rows.values())), "viridis"))
        shown = ax.imshow(grid, aspect="auto", vmin=bottom, vmax=top, cmap=colours)
        ax.set_title(label, fontsize=9)
        ax.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
        ax.set_yticks(range(len(blocks)), blocks if n == 0 else [""] * len(blocks), fontsize=7)
        fig.colorbar(shown, ax=ax, ticks=[bottom, (bottom + top) / 2, top], format="%.2g").ax.tick_params(labelsize=7)
    fig.savefig(path, format="png")


def _place(path: str) -> tuple[str, str]:
    """(block, kind) of a target: `model.layers.3.mlp.up_proj` is ("3", "mlp.up_proj")."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", path)
    return (found[1], found[2]) if found else ("–", path or "model")
