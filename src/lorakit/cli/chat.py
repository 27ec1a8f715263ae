"""lorakit chat: a conversation in the terminal.

    lorakit chat --adapter runs/a/adapter
    lorakit chat --adapter runs/clinc/adapter --template "_[inst] {prompt}_[/inst]"
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.app import app, out, quiet


@app.command()
def chat(
    adapter: Annotated[Path | None, typer.Option("--adapter", "-a", help="adapter folder")] = None,
    base: Annotated[str | None, typer.Option(help="base model; default: the adapter's, or the embedded one")] = None,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    template: Annotated[str | None, typer.Option(help="layout for models without a chat template, e.g. \"Q: {prompt}\\nA:\"")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="length of an answer")] = 128,
    temperature: Annotated[float, typer.Option(help="0: greedy")] = 0.0,
) -> None:
    """Talk with a model. /base and /adapter switch the adapter off and on, /reset forgets, /quit (or Ctrl-D) ends."""
    quiet()
    from contextlib import nullcontext

    from lorakit import api
    from lorakit.cli.use import ready
    from lorakit.training.data import CHAT, prompt_ids
    from lorakit.training.measure import evaluating
    from lorakit.training.measure import generate as run

    model, tok = ready(adapter, base)
    start = [{"role": "system", "content": system}] if system else []
    turns, off = list(start), False
    while True:
        try:
            said = input("you> ").strip()
        except EOFError:
            out.print()
            return
        if said in ("/quit", "/exit"):
            return
        if said in ("/base", "/adapter"):
            off = said == "/base"
            out.print(f"[adapter {'off' if off else 'on'}]", markup=False)
            continue
        if said == "/reset" or not said:
            turns = list(start)
            continue
        turns.append({"role": "user", "content": said})
        if template:
            ids = prompt_ids(tok, template.replace("\\n", "\n").replace("{prompt}", said).replace("{completion}", "").rstrip(" "))
        else:
            layout = None if tok.chat_template else CHAT
            ids = list(tok.apply_chat_template(turns, chat_template=layout, add_generation_prompt=True, return_dict=False))
        with evaluating(model), api.disabled(model) if off and adapter else nullcontext():
            answer = run(model, tok, [ids], max_new_tokens, temperature)[0].strip()
        turns.append({"role": "assistant", "content": answer})
        out.print(answer, markup=False)
