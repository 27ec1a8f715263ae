"""What differs between two saved adapters: what their configurations say, their targets and ranks, and the updates themselves.

    cosine       <ΔW_a, ΔW_b> / (|ΔW_a| |ΔW_b|)
    norm ratio   |ΔW_b| / |ΔW_a|
    difference   |ΔW_b - ΔW_a| / |ΔW_a|

All from the factors: <B A, B' A'> = Σ (Bᵀ B') ⊙ (A A'ᵀ), without a matrix of a layer's size.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.formats.folder import Folder
from lorakit.formats.receipt import compare_bases
from lorakit.merges.base import gram
from lorakit.merges.mix import loaded
from lorakit.merges.sources import InFolder
from lorakit.method import Method


@dataclass
class Diff:
    """What `diff` found. modules: target -> methods, ranks, norms, cosine, norm ratio, difference, of those that both have."""

    a: str
    b: str
    config: dict[str, tuple[Any, Any]]
    only_a: list[str]
    only_b: list[str]
    bases: list[str]  # what differs between the bases they were trained on
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    overall: dict[str, float] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether the two add exactly the same to every weight."""
        return not (self.only_a or self.only_b or self.bases) and all(m["difference"] == 0 for m in self.modules.values())

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self)) | {"same": self.same}

    def __str__(self) -> str:
        lines = [f"{self.a} | {self.b}"]
        lines += [f"  {k}: {a!r} | {b!r}" for k, (a, b) in self.config.items()]
        for where, paths in (("first", self.only_a), ("second", self.only_b)):
            if paths:
                lines.append(f"  only in the {where}: {', '.join(paths[:4])}{f' and {len(paths) - 4} more' if len(paths) > 4 else ''}")
        lines += [f"  other base: {b}" for b in self.bases[:3]]
        if self.modules:
            o = self.overall
            lines.append(f"  {len(self.modules)} targets of both: cosine {o['cosine']:.4f}, norm ratio {o['norm_ratio']:.4f}, difference {o['difference']:.4f}")
            for p, m in sorted(self.modules.items(), key=lambda e: e[1]["cosine"])[:5]:
                what = "" if m["methods"][0] == m["methods"][1] else f", {m['methods'][0]} | {m['methods'][1]}"
                ranks = "" if m["ranks"][0] == m["ranks"][1] else f", ranks {m['ranks'][0]} | {m['ranks'][1]}"
                lines.append(f"    {p}: cosine {m['cosine']:.4f}, norm ratio {m['norm_ratio']:.4f}{ranks}{what}")
        lines.append("  the same update on every target" if self.same else "  they differ")
        return "\n".join(lines)


@torch.no_grad()
def diff(a: str | Path, b: str | Path, model: nn.Module | None = None) -> Diff:
    """Compares two saved adapters. model: their base, which is needed where an update depends on the weight, else the reason is said."""
    folders = [Folder(a), Folder(b)]
    fa, fb = folders
    config = {k: (x, y) for k in sorted({*fa.config, *fb.config} - {"modules"}) if (x := fa.config.get(k)) != (y := fb.config.get(k))}
    ra, rb = (f.receipt["base"]["tensors"] if f.receipt else None for f in folders)
    bases = compare_bases(ra, rb) if ra and rb else []
    with ExitStack() as stack:
        sources = [InFolder(f) for f in folders] if model is None else [loaded(model, f, n, False, stack) for n, f in enumerate(folders)]
        sa, sb = sources
        out = Diff(str(a), str(b), config, [p for p in sa.paths if p not in sb.paths], [p for p in sb.paths if p not in sa.paths], bases)
        G = torch.zeros(2, 2, dtype=torch.float64)
        for p in (p for p in sa.paths if p in sb.paths):
            x, y = sa.vector(p), sb.vector(p)
            if x.shape != y.shape:
                raise LorakitError(f"{p}: an update of shape {list(x.shape)} in {a}, {list(y.shape)} in {b}: they are not adapters of one base")
            g = gram([x, y])
            same = x.rank == y.rank is not None and all(torch.equal(s, t) for s, t in zip(x.factors, y.factors, strict=True))
            G += g
            out.modules[p] = {"methods": [_title(f.methods[p]) for f in folders], "ranks": [x.rank, y.rank]} | _figures(g, same)
    out.overall = _figures(G, bool(out.modules) and all(m["difference"] == 0 for m in out.modules.values()))
    return out


def _title(method: Method) -> str:
    return method.card.title


def _figures(G: Tensor, same: bool) -> dict[str, Any]:
    aa, bb, ab = (max(float(G[0, 0]), 0.0), max(float(G[1, 1]), 0.0), float(G[0, 1]))
    norms = [math.sqrt(aa), math.sqrt(bb)]
    cosine = 1.0 if same else max(-1.0, min(1.0, ab / (norms[0] * norms[1]))) if aa and bb else 0.0
    apart = 0.0 if same else math.sqrt(max(aa + bb - 2 * ab, 0.0))
    return {"norms": norms, "cosine": cosine, "norm_ratio": norms[1] / norms[0] if aa else math.inf if bb else 1.0,
            "difference": apart / norms[0] if aa else math.inf if apart else 0.0}
