"""The command line: one file per verb, no logic of its own. `lorakit` and `python -m lorakit` are the same."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point. Exits with 1 and one line on the error stream for what a user can mend, 130 on Ctrl-C."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
        import yaml  # noqa: F401
    except ModuleNotFoundError as e:
        sys.exit(f"error: the command line needs the package `{e.name}`; mend: pip install 'lorakit[train]'")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not burn a core that something else uses
    from lorakit.cli.app import app, run

    sys.exit(run(app))
