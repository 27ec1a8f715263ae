"""lorakit config: every setting, as an example or a schema.

    lorakit config example > run.yaml
    lorakit config schema > schema.json
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lorakit.cli.app import app
from lorakit.errors import LorakitError, near


@app.command()
def config(what: Annotated[str, typer.Argument(help="`example` (a commented YAML) or `schema` (JSON Schema)")] = "example") -> None:
    """Print every setting of `train`, as a commented YAML or as JSON Schema."""
    from lorakit.training import config as c

    if what not in ("example", "schema"):
        raise LorakitError(f"config: no `{what}`{near(what, ('example', 'schema'))}")
    typer.echo(c.example() if what == "example" else json.dumps(c.Run.model_json_schema(), indent=2), nl=what == "schema")
