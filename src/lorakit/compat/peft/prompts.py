"""PEFT's configurations of prompts, prefixes and adaption prompts: the same fields and defaults, and the Spec each of them means."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorakit.compat.peft.config import HEADS, PeftConfig, PeftType, TaskType, register
from lorakit.errors import LorakitError, near
from lorakit.recipes import compose
from lorakit.spec import Spec


class PromptTuningInit(str, enum.Enum):  # noqa: UP042 (as in PEFT)
    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class PromptEncoderReparameterizationType(str, enum.Enum):  # noqa: UP042
    MLP = "MLP"
    LSTM = "LSTM"


def word(value: Any, kinds: type[enum.Enum], field: str) -> str:
    """The value of an enumeration's member, however it is spelled."""
    value = str(getattr(value, "value", value))
    if value not in (names := [k.value for k in kinds]):
        raise LorakitError(f"{field}: unknown `{value}`{near(value, names)}")
    return value


@dataclass
class PromptLearningConfig(PeftConfig):
    """What all of them say. The model's sizes are found out, whatever is written here."""

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    is_prompt_learning = True
    recipe, kind = "", None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = self.kind

    def options(self, model: nn.Module) -> dict[str, Any]:
        """compose's options beside the number of tokens."""
        return {}

    def spec(self, model: nn.Module, seed: int) -> Spec:
        """What this configuration means on a model."""
        there = {part for n, _ in model.named_modules() for part in n.split(".")}
        heads = HEADS.get(self.task_type) or ()
        saved = [n for n in dict.fromkeys([*(self.modules_to_save or []), *heads]) if n in there or n not in heads]
        return compose(self.recipe, heads=False, seed=seed, modules_to_save=saved or None, num_virtual_tokens=self.num_virtual_tokens, **self.options(model))


@register
@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """PEFT's PromptTuningConfig."""

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict | None = None

    recipe, kind = "prompt-tuning", PeftType.PROMPT_TUNING

    def __post_init__(self):
        super().__post_init__()
        text = word(self.prompt_tuning_init, PromptTuningInit, "prompt_tuning_init") == "TEXT"
        if text and not (self.tokenizer_name_or_path and self.prompt_tuning_init_text):
            raise LorakitError("prompt_tuning_init='TEXT' needs tokenizer_name_or_path and prompt_tuning_init_text")
        if self.tokenizer_kwargs and not text:
            raise LorakitError("tokenizer_kwargs mean something with prompt_tuning_init='TEXT' alone")

    def options(self, model):
        begin = {"RANDOM": "random", "SAMPLE_VOCAB": "vocab", "TEXT": "text"}[word(self.prompt_tuning_init, PromptTuningInit, "prompt_tuning_init")]
        if begin != "text":
            return {"start_at": begin}
        from transformers import AutoTokenizer

        kwargs = {k: v for k, v in (self.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
        ids = AutoTokenizer.from_pretrained(self.tokenizer_name_or_path, **kwargs)(self.prompt_tuning_init_text)["input_ids"]
        return {"start_at": begin, "token_ids": ids}


@register
@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """PEFT's PromptEncoderConfig: P-tuning."""

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    recipe, kind = "p-tuning", PeftType.P_TUNING

    def options(self, model):
        encoder = word(self.encoder_reparameterization_type, PromptEncoderReparameterizationType, "encoder_reparameterization_type").lower()
        return {"encoder": encoder, "hidden": self.encoder_hidden_size, "lstm_layers": self.encoder_num_layers, "encoder_dropout": self.encoder_dropout}


@register
@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """PEFT's PrefixTuningConfig."""

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    recipe, kind = "prefix-tuning", PeftType.PREFIX_TUNING

    def options(self, model):
        pairs = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        return {"crossed": pairs, "projection": self.prefix_projection, "hidden": self.encoder_hidden_size,
                "start_at": "zero" if self.init_weights == "zero" else "normal"}


@register
@dataclass
class CPTConfig(PromptLearningConfig):
    """PEFT's CPTConfig."""

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None

    recipe, kind = "cpt", PeftType.CPT

    def __post_init__(self):
        super().__post_init__()
        if self.task_type != TaskType.CAUSAL_LM:
            raise LorakitError("CPTConfig: the task_type must be CAUSAL_LM")
        self.cpt_token_ids = self.cpt_token_ids or [0]
        self.num_virtual_tokens = n = len(self.cpt_token_ids)
        self.cpt_mask, self.cpt_tokens_type_mask = self.cpt_mask or [1] * n, self.cpt_tokens_type_mask or [1] * n
        if not n == len(self.cpt_mask) == len(self.cpt_tokens_type_mask):
            raise LorakitError("CPTConfig: cpt_token_ids, cpt_mask and cpt_tokens_type_mask must be of one length")

    def spec(self, model, seed):
        return compose("cpt", heads=False, seed=seed, token_ids=self.cpt_token_ids, types=self.cpt_tokens_type_mask, eps=self.opt_projection_epsilon,
                       format_eps=self.opt_projection_format_epsilon, weighted=self.opt_weighted_loss_type, decay=self.opt_loss_decay_factor)


@register
@dataclass
class AdaptionPromptConfig(PeftConfig):
    """PEFT's AdaptionPromptConfig."""

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    is_adaption_prompt, kind = True, PeftType.ADAPTION_PROMPT

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = self.kind

    def spec(self, model, seed):
        if self.target_modules not in (None, "self_attn"):
            raise LorakitError(f"AdaptionPromptConfig: target_modules `{self.target_modules}`: the attentions are found out; mend: leave it None")
        return compose("adaption-prompt", heads=False, seed=seed, adapter_len=self.adapter_len, adapter_layers=self.adapter_layers)
