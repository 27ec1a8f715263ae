"""lorakit quantize: a base model with its linear layers in fewer bits, as a folder that every verb takes as a base.

    lorakit quantize ./base -o ./base-nf4
    lorakit quantize ./base -o ./base-int4 --scheme int4 --set group=32
    lorakit quantize ./base -o ./base-3bit --bits 3.0

With --bits every matrix gets the scheme, of nf2, nf3, nf4 and int8, that makes the least error within that many bits a weight (an integer linear
programme, as LQ-LoRA has it). The folder is read back and compared before it appears.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.cli.app import app, out, quiet


@app.command()
def quantize(
    base: Annotated[str, typer.Argument(help="model folder or hub name")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder of the quantised model")],
    scheme: Annotated[str, typer.Option(help="nf4, nf3, nf2, or int8, int7, … int2")] = "nf4",
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="an option of the scheme, e.g. --set block=32")] = None,
    bits: Annotated[float | None, typer.Option(help="bits a weight on average; the schemes are chosen for it")] = None,
    dtype: Annotated[str, typer.Option(help="what the other tensors are kept as: auto, float32, bfloat16 or float16")] = "auto",
    task: Annotated[str, typer.Option(help="causal-lm, sequence-classification, seq2seq or features")] = "causal-lm",
) -> None:
    """Pack a base model's linear layers into 2 to 8 bits, save it, read it back, and say what it costs."""
    quiet()
    import yaml

    from lorakit import api
    from lorakit.errors import LorakitError

    wrong = next((s for s in sets or () if "=" not in s), None)
    if wrong is not None:
        raise LorakitError(f"--set {wrong}: write KEY=VALUE")
    if bits is not None and sets:
        raise LorakitError("--bits chooses the schemes itself; mend: leave --set out")
    how: dict[str, Any] = {"name": scheme} | {k: yaml.safe_load(v) for k, v in (s.split("=", 1) for s in sets or ())}
    said = api.save_quantized(base, output, how, bits=bits, dtype=dtype, task=task)
    for name, n in said.layers.items():
        out.print(f"  {name}: {n} layers", markup=False)
    out.print(f"{said.bits:.3f} bits a weight in {said.numbers:,} weights; {said.before:,} -> {said.after:,} bytes in all", markup=False)
    out.print(f"relative error of the weights {said.error:.2%}, of the logits {said.logits:.2%}" if said.logits is not None else
              f"relative error of the weights {said.error:.2%}", markup=False)
    out.print(f"quantised model: {output}", markup=False)
