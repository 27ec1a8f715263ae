"""The base of a run, as its configuration says."""

from __future__ import annotations

import torch
from torch import nn

from lorakit.models import load_base
from lorakit.training.prepare import Prepared


def bare(p: Prepared) -> nn.Module:
    """The model of a run before any adapter; a classifier's head is drawn from the run's seed."""
    base = p.run.base
    labels = {"num_labels": len(p.labels), "id2label": dict(enumerate(p.labels)), "label2id": {v: k for k, v in enumerate(p.labels)},
              "pad_token_id": p.tokenizer.pad_token_id} if p.labels else {}
    torch.manual_seed(p.run.train.seed)
    return load_base(base.path, p.task, dtype=base.dtype, revision=base.revision, trust_remote_code=base.trust_remote_code, quantize=base.quantize, **labels)
