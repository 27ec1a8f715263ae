"""The base of a run, as its configuration says."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lorakit.formats.folder import Folder
from lorakit.models import load_base
from lorakit.proof import load_base_for
from lorakit.training.config import Run
from lorakit.training.prepare import Prepared


def bare(p: Prepared) -> nn.Module:
    """The model of a run before any adapter; a classifier's head is drawn from the run's seed."""
    base = p.run.base
    labels = {"num_labels": len(p.labels), "id2label": dict(enumerate(p.labels)), "label2id": {v: k for k, v in enumerate(p.labels)},
              "pad_token_id": p.tokenizer.pad_token_id} if p.labels else {}
    torch.manual_seed(p.run.train.seed)
    return load_base(base.path, p.task, dtype=base.dtype, revision=base.revision, trust_remote_code=base.trust_remote_code, quantize=base.quantize, **labels)


def reread(run: Run, adapter: Folder) -> nn.Module:
    """The base of a run's saved adapter, read from disk anew: its own where the start made one."""
    base, own = run.base, Path(run.output) / "base"
    return load_base_for(adapter, own if own.is_dir() else base.path, base.dtype, revision=base.revision, trust_remote_code=base.trust_remote_code)
