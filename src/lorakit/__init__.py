"""lorakit: the whole LoRA family in one place, composable, from plan to server.

>>> import torch, lorakit
>>> model = lorakit.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), "dora", r=2, target_modules="0")
>>> lorakit.trainable(model)[0]
40
"""

from lorakit.api import (
    activate,
    active,
    adapt,
    adapters,
    convert,
    delete,
    detach,
    diff,
    disabled,
    freeze,
    given,
    load,
    merge,
    merge_checkpoint,
    merged,
    mix,
    mix_checkpoints,
    rows,
    save,
    save_base,
    save_merged,
    shrink,
    trainable,
    unmerge,
)
from lorakit.errors import LorakitError
from lorakit.proof import verify
from lorakit.quantized import dequantize, quantize

__version__ = "0.1.0"
__all__ = ["LorakitError", "activate", "active", "adapt", "adapters", "convert", "delete", "dequantize", "detach", "diff", "disabled", "freeze",
           "given", "load", "merge", "merge_checkpoint", "merged", "mix", "mix_checkpoints", "quantize", "rows", "save", "save_base", "save_merged", "shrink",
           "trainable", "unmerge", "verify"]
