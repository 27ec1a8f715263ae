"""lorakit mix: one adapter of several, or one model.

    lorakit mix a b -o c --weights 0.6,0.4                       # the weighted sum, exact: ranks add up
    lorakit mix a b -o c --weights 1,-0.5 --rank 8               # take something away; the nearest of rank 8, error said
    lorakit mix a b -o c --rule ties --density 0.3 --rank 16
    lorakit mix a b -o c --rule regmean --data a.jsonl --data b.jsonl
    lorakit mix mix.yaml                                         # keys: adapters, to, rule, weights, rank, niter, base,
                                                                 # options, seed, check_base, data, search, search_options, output
    lorakit mix a b d -o c --search lorahub --data few.jsonl     # weights that suit a few examples, without gradients
    lorakit mix --rules
    lorakit mix modelA modelB --base base --rule ties --density 0.5 -o c   # whole models, as what they have more than the base
    lorakit mix modelA modelB -o c --weights 0.5,0.5                       # the mean of whole models (a soup); also --rule slerp
    lorakit mix a b --rule ties --base base --to checkpoint -o c           # adapters into the base at full rank, nothing left out

Adapters may differ in rank, scale, targets and method. The base is needed only where what a method adds depends on the weight; where it
is at hand (--base, or the folder that the first adapter names) the result is verified on it. With --data, each file is measured with
the base, every adapter alone, and the mix. The folder holds the adapter, a receipt whose lineage names the sources, `mix.json` (signs,
interference, cosines, norms of every target) and `mix.png`. It appears whole or not at all.

Whole models (folders of safetensors), alone or with adapters on the base, make a checkpoint, tensor by tensor, without a model in memory:
names and shapes must be equal; dtypes, shards and tokenizer are the base's, or the first model's, where there is no base.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from lorakit.cli.app import app, out, quiet
from lorakit.errors import LorakitError


@app.command()
def mix(
    adapters: Annotated[list[Path] | None, typer.Argument(help="adapter folders, folders of whole models, or one YAML file")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder to write; not there yet")] = None,
    to: Annotated[str | None, typer.Option(help="adapter, or checkpoint: a whole model, no rank cut; default: checkpoint where a source is one")] = None,
    rule: Annotated[str | None, typer.Option(help="how; default linear, the weighted sum")] = None,
    weights: Annotated[list[str] | None, typer.Option("--weights", "-w", help="0.6,0.4, or once for each adapter; default 1")] = None,
    rank: Annotated[int | None, typer.Option(help="of the result; default: the sum, or the largest where a rule leaves no factors")] = None,
    niter: Annotated[int | None, typer.Option(help="bring matrices (ties, dare, …) to the rank by so many rounds of subspace iteration: fast; try 2")] = None,
    density: Annotated[float | None, typer.Option(help="share of the numbers that a rule keeps")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="an option of the rule")] = None,
    base: Annotated[str | None, typer.Option(help="base model")] = None,
    data: Annotated[list[str] | None, typer.Option(help="data of each adapter, in their order, or one for all")] = None,
    search: Annotated[str | None, typer.Option(help="find the weights on the rows of --data: lorahub, or scan for one adapter")] = None,
    seed: Annotated[int | None, typer.Option(help="of what a rule draws")] = None,
    rules: Annotated[bool, typer.Option("--rules", help="list the rules and their options, and stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the report as JSON")] = False,
) -> None:
    """Make one adapter of several, or one model, say what that leaves out, and verify it."""
    quiet()
    from lorakit.experiments import mixing
    from lorakit.formats.files import read_json
    from lorakit.merges import ROWS
    from lorakit.merges.checkpoints import whole
    from lorakit.merges.mix import MIX
    from lorakit.training.config import number, read_yaml

    if rules:
        for name, (cls, preset) in ROWS.items():
            options = ", ".join(f"{k}={v}" for k, v in (cls.defaults() | preset).items())
            out.print(f"{name:<26}{cls.title}: {cls.formula}{f'  [{options}]' if options else ''}", markup=False)
        return
    paths, numbers = mixing.sorted_out([str(a) for a in adapters or []], weights or ())
    from_file = len(paths) == 1 and Path(paths[0]).suffix in (".yaml", ".yml")
    raw: dict[str, Any] = read_yaml(paths[0]) if from_file else {"adapters": paths}
    given = {"output": output and str(output), "to": to, "rule": rule, "weights": numbers, "rank": rank, "niter": niter, "base": base, "data": data or None,
             "seed": seed, "search": search}
    raw |= {k: v for k, v in given.items() if v is not None}
    for word in sets or ():
        key, eq, value = word.partition("=")
        if not eq:
            raise LorakitError(f"--set takes key=value, not {word!r}")
        raw["options"] = raw.get("options", {}) | {key.strip(): number(yaml.safe_load(value))}
    if density is not None:
        raw["options"] = raw.get("options", {}) | {"density": density}
    done = mixing.run(mixing.read(raw, paths[0] if from_file else "mix"))
    said = read_json(Path(done.output) / MIX)
    if as_json:
        out.print(json.dumps(said, indent=2), markup=False)
        return
    out.print(str(done), markup=False)
    for line in mixing.table(said.get("metrics", ())):
        out.print(line, markup=False)
    out.print(f"mixed {'model' if whole(done.output) else 'adapter'}: {done.output}", markup=False)
