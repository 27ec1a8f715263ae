"""Preference pairs (chosen, rejected): DPO through TRL (Rafailov et al., 2023, arXiv 2305.18290), against the model as the run began."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lorakit.errors import LorakitError, extra
from lorakit.training import data as d
from lorakit.training.bridge import AdapterTrainerMixin

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from lorakit.training.run import Prepared


def side(row: dict, name: str) -> dict:
    """One answer of a pair as an ordinary row: what the loss and the preview are taken of."""
    if isinstance(row[name], list):
        prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        return {"messages": [*prompt, *row[name]]}
    return {"prompt": row["prompt"], "completion": row[name]}


def preferred(model: nn.Module, p: Prepared) -> float:
    """Share of held-out pairs whose chosen answer is the likelier one, by the token."""
    from lorakit.training.measure import token_loss

    pad, length, right = p.tokenizer.pad_token_id, max(len(r["input_ids"]) for r in p.train.rows), 0
    for row in p.held:
        loss = [token_loss(model, d.encode([side(row, k)], p.tokenizer, length, True, p.run.data.template).rows, pad, 1) for k in ("chosen", "rejected")]
        right += loss[0] < loss[1]
    return right / len(p.held)


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
    prompt, chosen = d.split_prompt(side(row, "chosen"), template)
    return {"prompt": prompt, "chosen": chosen, "rejected": d.split_prompt(side(row, "rejected"), template)[1]}
