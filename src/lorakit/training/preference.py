"""Preference pairs (chosen, rejected): DPO through TRL (Rafailov et al., 2023, arXiv 2305.18290), against the model as the run began."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lorakit.errors import LorakitError, extra
from lorakit.training import data as d
from lorakit.training.bridge import AdapterTrainerMixin
from lorakit.training.prepare import Prepared

if TYPE_CHECKING:
    from transformers import TrainingArguments


def dpo(measured: type, p: Prepared, model: nn.Module, args: TrainingArguments, hooks: Sequence[Any]) -> Any:
    """TRL's DPOTrainer over the run's rows; the reference is a frozen copy of the model as it is now."""
    try:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer
    except ModuleNotFoundError as e:
        raise extra(e.name or "trl", "trl") from e
    rows = [_pair(r, p.run.data.template) for r in p.rows]
    fields = {k: v for k, v in args.to_dict().items() if k in DPOConfig.__dataclass_fields__ and DPOConfig.__dataclass_fields__[k].init}
    fields |= {"beta": p.run.train.dpo_beta, "max_length": max(len(r["input_ids"]) for r in p.train.rows) * 2, "bf16": p.run.train.bf16}
    trainer = type("PreferenceTrainer", (measured, AdapterTrainerMixin, DPOTrainer), {})
    tok = copy.copy(p.tokenizer)
    tok.chat_template = tok.chat_template or d.CHAT
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    try:
        return trainer(model=model, ref_model=reference, args=DPOConfig(**fields), train_dataset=Dataset.from_list(rows),
                       eval_dataset=Dataset.from_list(rows[:1]), processing_class=tok, hooks=hooks, lineage=p.lineage)
    except (ValueError, TypeError, KeyError) as e:
        raise LorakitError(f"TRL's DPOTrainer refuses this run: {str(e).splitlines()[0]}") from e


def _pair(row: dict, template: str | None) -> dict:
    if template is None or isinstance(row["chosen"], list):
        return row
    prompt, chosen = d.split_prompt(d.side(row, "chosen"), template)
    return {"prompt": prompt, "chosen": chosen, "rejected": d.split_prompt(d.side(row, "rejected"), template)[1]}
