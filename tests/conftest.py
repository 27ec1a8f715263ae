"""Shared fixtures: tiny whole models, the folder of real data, one thread."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import tiny
import torch

torch.set_num_threads(1)
DATA = Path(os.environ.get("LORAKIT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture
def data() -> Path:
    """The folder of real models and data; tests that need it are skipped where it is not."""
    if not DATA.is_dir():
        pytest.skip(f"real data not there: {DATA} (set LORAKIT_DATA)")
    return DATA


@pytest.fixture
def llama():
    return tiny.llama()


@pytest.fixture
def tied_llama():
    return tiny.llama(tied=True)


@pytest.fixture
def gpt2():
    return tiny.gpt2()


@pytest.fixture
def bert():
    return tiny.bert()


@pytest.fixture
def opt():
    return tiny.opt()


@pytest.fixture(params=list(tiny.MODELS))
def whole(request):
    """Each whole tiny model in turn."""
    return tiny.MODELS[request.param]()


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a verb of the command line in this process: (exit code, what it printed, its errors)."""
    from lorakit.cli.app import app, run

    def go(*args):
        monkeypatch.setattr(sys, "argv", ["lorakit", *map(str, args)])
        code = run(app)
        got = capsys.readouterr()
        return code, got.out, got.err

    return go
