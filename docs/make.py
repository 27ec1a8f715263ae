"""Writes docs/verbs/*.md and docs/methods/*.md from the code. `python docs/make.py --check` fails if they are stale."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import typer

from lorakit.catalog import entries
from lorakit.cli.app import VERBS, app

HERE = Path(__file__).parent
NOTE = "<!-- made by docs/make.py from the code; edit the code -->\n\n"


def verb_page(name: str) -> str:
    module = importlib.import_module(f"lorakit.cli.{name}")
    command = typer.main.get_command(app).commands[name]
    title, _, text = module.__doc__.strip().partition("\n")
    rows = []
    for p in command.params:
        default = p.default if p.default not in (None, False, "") and not callable(p.default) else ""
        spelling = ", ".join(f"`{o}`" for o in p.opts) if p.param_type_name == "option" else f"`{p.name.upper()}`"
        rows.append(f"| {spelling} | {default} | {(getattr(p, 'help', '') or '').replace('|', '/')} |")
    table = "\n".join(["| argument or option | default | |", "|---|---|---|", *rows])
    return f"{NOTE}# {title.rstrip('.')}\n\n{command.help}\n\n{text.strip()}\n\n{table}\n".replace("\n\n\n", "\n\n")


def card(e: dict) -> str:
    head = f"{NOTE}# {e['title']} (`{e['name']}`, {e['kind']})\n\n"
    facts = [f"`{e['formula']}`"] if e["formula"] else []
    facts += [f"Paper: arXiv {e['paper']}."] if e["paper"] else []
    facts += [f"Also called: {', '.join(e['aliases'])}."] if e["aliases"] else []
    facts += [f"Merging into the base: {e['mergeable']}."] if "mergeable" in e else []
    facts += [f"Laws the test-suite verifies: {', '.join(e['laws'])}."] if e.get("laws") else []
    body = "\n\n".join(facts) + "\n"
    if "sites" in e:
        body += f"\nTargets it fits: {', '.join(e['sites'])}. Numbers that train on one (o outputs, i inputs): {e['parameters'] or 'none'}.\n"
    if e.get("doc"):
        body += f"\n```text\n{e['doc']}\n```\n"
    if e["kind"] == "recipe":
        body += f"\nA composition: `{e['method']}`" + (f", start `{e['init']}`" if e["init"] else "") + (
            f", frozen leaves {', '.join(e['freeze'])}" if e["freeze"] else "") + (f", by default {e['options']}" if e["options"] else "") + ".\n"
    if e.get("fields"):
        body += "\n| option | type | default | |\n|---|---|---|---|\n" + "".join(
            f"| `{f['name']}` | {f['type']} | {'' if f['default'] is None else f['default']} | {f['about']} |\n" for f in e["fields"])
    if e.get("leaves"):
        body += "\n| leaf | axes | trains | shared | key in files |\n|---|---|---|---|---|\n" + "".join(
            f"| {leaf['name']} | {leaf['axes']} | {'yes' if leaf['trains'] else 'no'} | {'yes' if leaf['shared'] else 'no'} | `{leaf['key']}` |\n"
            for leaf in e["leaves"])
    return head + body


def pages() -> dict[Path, str]:
    for v in VERBS:
        importlib.import_module(f"lorakit.cli.{v}")
    out = {HERE / "verbs" / f"{v}.md": verb_page(v) for v in VERBS}
    every = entries()
    out |= {HERE / "methods" / f"{e['kind']}-{e['name']}.md": card(e) for e in every}
    rows = "".join(f"| {e['kind']} | [{e['name']}]({e['kind']}-{e['name']}.md) | `{e['formula']}` | {e['paper']} |\n" for e in every)
    out[HERE / "methods" / "README.md"] = f"{NOTE}# Everything by name\n\n| kind | name | formula | arXiv |\n|---|---|---|---|\n{rows}"
    return out


def main() -> None:
    stale = []
    wanted = pages()
    there = {f for d in ("verbs", "methods") for f in (HERE / d).glob("*.md")}
    for path, text in wanted.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
    for path in there - set(wanted):
        stale.append(path.name)
        if "--check" not in sys.argv:
            path.unlink()
    if "--check" in sys.argv and stale:
        sys.exit(f"stale: {', '.join(stale)}; mend: make docs")
    print(f"{len(wanted)} pages, {len(stale)} {'stale' if '--check' in sys.argv else 'written'}")


if __name__ == "__main__":
    main()
