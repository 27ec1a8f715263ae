"""lorakit generate: text from a base, with or without an adapter.

    lorakit generate "The for statement" --adapter runs/a/adapter --compare
    echo "def main" | lorakit generate - --max-new-tokens 20
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.app import app, out, quiet


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads it from standard input")],
    adapter: Annotated[Path | None, typer.Option("--adapter", "-a", help="adapter folder")] = None,
    base: Annotated[str | None, typer.Option(help="base model; default: the adapter's, or the embedded one")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="length of the continuation")] = 64,
    temperature: Annotated[float, typer.Option(help="0: greedy")] = 0.0,
    seed: Annotated[int, typer.Option(help="for temperature > 0")] = 0,
    compare: Annotated[bool, typer.Option("--compare", help="also show what the base alone writes")] = False,
) -> None:
    """Continue a text."""
    quiet()
    import torch

    from lorakit import api
    from lorakit.cli.use import ready
    from lorakit.training.data import prompt_ids
    from lorakit.training.measure import evaluating
    from lorakit.training.measure import generate as run

    model, tok = ready(adapter, base)
    text = sys.stdin.read() if prompt == "-" else prompt

    def write() -> str:
        with evaluating(model):
            torch.manual_seed(seed)
            return run(model, tok, [prompt_ids(tok, text)], max_new_tokens, temperature)[0]

    if compare and adapter is not None:
        with api.disabled(model):
            out.print(f"--- base\n{text}{write()}\n--- with the adapter", markup=False)
    out.print(f"{text}{write()}", markup=False)
