"""The application object that verbs register on, and how it ends."""

from __future__ import annotations

import sys
import traceback
from importlib import import_module

import typer
from rich.console import Console

from lorakit.errors import LorakitError

VERBS = ("plan", "train", "compare", "tune", "generate", "chat", "quantize", "merge", "mix", "diff", "shrink", "convert", "verify", "inspect", "methods",
         "config", "env")
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(help="The whole LoRA family: train, merge, verify and use low-rank adapters.", no_args_is_help=True, add_completion=False,
                  rich_markup_mode=None, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


def quiet() -> None:
    """Our own lines only: no progress bars of loading, no advice meant for developers."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def run(application: typer.Typer) -> int:
    """Runs the command line and returns the exit code."""
    for verb in VERBS:
        import_module(f"lorakit.cli.{verb}")
    try:
        application()
    except SystemExit as e:  # how typer ends, also after a usage error of its own
        return e.code if isinstance(e.code, int) else 0
    except LorakitError as e:
        err.print(f"error: {e}", style="red", markup=False)
    except KeyboardInterrupt:
        return 130
    except OSError as e:
        err.print(f"error: {e}", style="red", markup=False)
    except Exception as e:
        traceback.print_exc(file=sys.stderr)
        err.print(f"error: {type(e).__name__}: {e} (this is a defect of lorakit or of a library under it; please report it with the lines above)",
                  style="red", markup=False)
    return 1
