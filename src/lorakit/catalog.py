"""Everything the library knows by name, over all axes, as one list: for the command line, the docs and the tests."""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache
from typing import Any

import torch
from torch import nn

from lorakit.errors import LorakitError, near
from lorakit.hooks import HOOKS
from lorakit.inits import INITS
from lorakit.method import METHODS, Around, Method, Wrapper
from lorakit.recipes import RECIPES
from lorakit.sites import Site, site_for
from lorakit.sites.parameters import ParameterSite
from lorakit.stores import STORES


def _field(f: dataclasses.Field) -> dict[str, Any]:
    row = {"name": f.name, "type": str(f.type), "default": None if f.default is dataclasses.MISSING else f.default}
    return row | ({"choices": list(f.metadata["choices"])} if "choices" in f.metadata else {})


def _fields(cls: type) -> list[dict[str, Any]]:
    """Fields with the comment that follows them in the source."""
    lines = {line.split(":")[0].strip(): line.partition("  # ")[2].strip() for line in inspect.getsource(cls).splitlines() if ":" in line}
    return [_field(f) | {"about": lines.get(f.name, "")} for f in dataclasses.fields(cls)]


@cache
def _sites() -> dict[str, Site]:
    """One target of each kind, wide enough for every method's defaults; without values."""
    with torch.device("meta"):
        called = {"linear": nn.Linear(1024, 768), "embedding": nn.Embedding(1024, 768), "conv1d": nn.Conv1d(256, 768, 3), "conv2d": nn.Conv2d(256, 768, 3),
                  "conv3d": nn.Conv3d(256, 768, 2), "grouped conv": nn.Conv2d(512, 768, 3, groups=2)}
        read = {"attention": nn.MultiheadAttention(768, 12), "experts": nn.ParameterDict({"w": torch.empty(4, 768, 1024)}), "vector": nn.LayerNorm(768)}
    keys = {"attention": "in_proj_weight", "experts": "w", "vector": "weight"}
    return {k: site_for(m) for k, m in called.items()} | {k: ParameterSite(m, keys[k]) for k, m in read.items()}


def sites(method: Method) -> dict[str, str]:
    """Kind of target -> "" where the method fits, else why it means nothing there."""
    return {k: method.on(s).unfit(s) or "" for k, s in _sites().items()}


def count(method: Method) -> str:
    """The numbers that train on one target, from the axes of its leaves; shared ones are counted once for all who share them."""
    own = [leaf.axes.replace(" ", "·") for leaf in method.leaves.values() if leaf.trains and not leaf.shared]
    once = [leaf.axes.replace(" ", "·") for leaf in method.leaves.values() if leaf.trains and leaf.shared]
    return " + ".join(own) + (f"; shared: {' + '.join(once)}" if once else "")


def _what(method: Method) -> dict[str, Any]:
    where = [f"whole {method.around_a}"] if isinstance(method, Around) else [k for k, why in sites(method).items() if not why]
    return {"mergeable": method.mergeable, "sites": where, "parameters": count(method),
            "axes": {k: leaf.axes.split() for k, leaf in method.leaves.items()}}


def _method(name: str, cls: type[Method]) -> dict[str, Any]:
    leaves = [{"name": k, "axes": v.axes, "trains": v.trains, "shared": v.shared, "key": v.key or f"{name}_{k}"} for k, v in cls.own.items()]
    wraps = issubclass(cls, Wrapper)
    return {"name": name, "kind": "wrapper" if wraps else "method", "title": cls.card.title, "formula": cls.card.formula,
            "paper": cls.card.paper, "aliases": list(cls.card.aliases), "laws": list(cls.card.laws), "leaves": leaves,
            "fields": _fields(cls), "doc": inspect.getdoc(inspect.getmodule(cls))} | ({"mergeable": "as the method inside"} if wraps else _what(cls()))


def entries() -> list[dict[str, Any]]:
    """One object per name: name, kind, title, formula, paper (arXiv id), aliases, and what is particular to its kind."""
    out = []
    for name, r in RECIPES.items():
        out.append({"name": name, "kind": "recipe", "title": r.title, "formula": r.formula, "paper": r.paper, "aliases": list(r.aliases),
                    "method": r.method.to_dict(), "init": r.init, "freeze": list(r.freeze), "options": dict(r.options)} | _what(r.method))
    out += [_method(name, cls) for name, cls in METHODS.items()]
    for name, i in INITS.items():
        out.append({"name": name, "kind": "init", "title": i.title, "formula": i.formula, "paper": i.paper, "aliases": list(i.aliases),
                    "doc": inspect.getdoc(inspect.getmodule(i.fn))})
    for name, h in HOOKS.items():
        out.append({"name": name, "kind": "hook", "title": h.title, "formula": h.formula, "paper": h.paper,
                    "aliases": [a for a in (name.replace("_", "-"), h.title.lower()) if a != name], "fields": _fields(h),
                    "doc": inspect.getdoc(inspect.getmodule(h))})
    for name, s in STORES.items():
        out.append({"name": name, "kind": "store", "title": s.title, "formula": s.formula, "paper": "", "aliases": []})
    return out


def show(name: str, every: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Every entry (of `entries()`) that has this name or alias, or is about this paper. LorakitError with the nearest names otherwise."""
    word = name.lower().replace("_", "-").replace(" ", "-")

    def names(e: dict[str, Any]) -> set[str]:
        return {n.lower().replace("_", "-").replace(" ", "-") for n in (e["name"], e["title"], e["paper"], *e["aliases"]) if n}

    every = entries() if every is None else every
    found = [e for e in every if word in names(e)]
    if not found:
        raise LorakitError(f"nothing is called `{name}`{near(word, sorted(set().union(*map(names, every))))}")
    return found
