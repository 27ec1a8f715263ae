"""Everything the library knows by name, over all axes, as one list: for the command line, the docs and the tests."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from lorakit.errors import LorakitError, near
from lorakit.hooks import HOOKS
from lorakit.inits import INITS
from lorakit.method import METHODS, Method, Wrapper
from lorakit.recipes import RECIPES
from lorakit.stores import STORES


def _field(f: dataclasses.Field) -> dict[str, Any]:
    row = {"name": f.name, "type": str(f.type), "default": None if f.default is dataclasses.MISSING else f.default}
    return row | ({"choices": list(f.metadata["choices"])} if "choices" in f.metadata else {})


def _fields(cls: type) -> list[dict[str, Any]]:
    """Fields with the comment that follows them in the source."""
    lines = {line.split(":")[0].strip(): line.partition("  # ")[2].strip() for line in inspect.getsource(cls).splitlines() if ":" in line}
    return [_field(f) | {"about": lines.get(f.name, "")} for f in dataclasses.fields(cls)]


def _method(name: str, cls: type[Method]) -> dict[str, Any]:
    leaves = [{"name": k, "axes": v.axes, "trains": v.trains, "shared": v.shared, "key": v.key or f"{name}_{k}"} for k, v in cls.own.items()]
    return {"name": name, "kind": "wrapper" if issubclass(cls, Wrapper) else "method", "title": cls.card.title, "formula": cls.card.formula,
            "paper": cls.card.paper, "aliases": list(cls.card.aliases), "laws": list(cls.card.laws), "mergeable": "exact", "leaves": leaves,
            "fields": _fields(cls), "doc": inspect.getdoc(inspect.getmodule(cls))}


def entries() -> list[dict[str, Any]]:
    """One object per name: name, kind, title, formula, paper (arXiv id), aliases, and what is particular to its kind."""
    out = []
    for name, r in RECIPES.items():
        out.append({"name": name, "kind": "recipe", "title": r.title, "formula": r.formula, "paper": r.paper, "aliases": list(r.aliases),
                    "method": r.method.to_dict(), "init": r.init, "freeze": list(r.freeze), "mergeable": "exact"})
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


def show(name: str) -> list[dict[str, Any]]:
    """Every entry that has this name or alias, or is about this paper. LorakitError with the nearest names otherwise."""
    word = name.lower().replace("_", "-").replace(" ", "-")

    def names(e: dict[str, Any]) -> set[str]:
        return {n.lower().replace("_", "-").replace(" ", "-") for n in (e["name"], e["title"], e["paper"], *e["aliases"]) if n}

    every = entries()
    found = [e for e in every if word in names(e)]
    if not found:
        raise LorakitError(f"nothing is called `{name}`{near(word, sorted(set().union(*map(names, every))))}")
    return found
