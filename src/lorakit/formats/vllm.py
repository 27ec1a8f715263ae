"""A PEFT folder that vLLM takes: one rank and one scale for all, plain LoRA, nothing trained beside it.

vLLM reads `r`, `lora_alpha`, `use_rslora` and the tensors; patterns of ranks and alphas it does not read, and DoRA, whole modules and
biases it refuses. Adapters of different rank are padded with zeros, other scales folded into the second factor.
"""

from __future__ import annotations

from typing import Any

from lorakit.errors import LorakitError
from lorakit.formats import peft_folder
from lorakit.formats.base import Format, not_lora, one_scale, rank_stabilised
from lorakit.formats.folder import Folder

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of vLLM's --max-lora-rank


class VLLM(Format):
    name = "vllm"
    looks_for = ""  # what is written so is a PEFT folder

    def found(self, path):
        return False

    def read(self, path, model):
        return Folder(path)

    def unfit(self, part):
        return not_lora(part)

    def write(self, source, out, model, **options: Any):
        given = source.parts()
        parts, _, notes = one_scale(given, rank=True)
        rank = next(iter(parts.values())).method.r
        room = next((r for r in RANKS if r >= rank), None)
        if room is None:
            raise LorakitError(f"vllm: rank {rank} is above the highest that vLLM has room for, {RANKS[-1]}; mend: rank={RANKS[-1]} or lower")
        made = Folder.held(source.path, parts, **{k: v for k, v in source.config.items() if k in KEPT})
        made.receipt, made.changed = source.receipt, source.changed
        leaves = sorted({p.rpartition(".")[2] for p in parts})
        notes = [*rank_stabilised(given), *notes, f"rank {rank} for all: start vLLM with --enable-lora --max-lora-rank {room} or more"]
        return [*notes, *peft_folder.write(made, out, model, target_modules=leaves)]


KEPT = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "lora_dropout")
