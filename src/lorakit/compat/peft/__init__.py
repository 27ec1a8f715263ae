"""PEFT's names on lorakit: code written for PEFT runs with one import changed.

    from lorakit.compat.peft import LoraConfig, get_peft_model        # was: from peft import …

A thin translation: configurations become Specs, adapters live on the base as `lorakit.adapt` puts them. docs/from-peft.md
says what maps to what and what differs. The package peft need not be installed.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lorakit.compat.peft.config import LoraConfig, LoraRuntimeConfig, PeftConfig, PeftType, TaskType, from_dict, locate
from lorakit.compat.peft.family import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    OFTConfig,
    PolyConfig,
    VBLoRAConfig,
    VeraConfig,
)
from lorakit.compat.peft.model import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from lorakit.compat.peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from lorakit.compat.peft.prompts import (
    AdaptionPromptConfig,
    CPTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptLearningConfig,
    PromptTuningConfig,
    PromptTuningInit,
)
from lorakit.compat.peft.start_configs import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from lorakit.compat.peft.starts import get_eva_state_dict, initialize_lora_eva_weights, preprocess_corda, preprocess_loraga
from lorakit.compat.peft.tuner import LoraModel, get_layer_status, get_model_status, inject
from lorakit.compat.peft.weights import get_peft_model_state_dict, set_peft_model_state_dict
from lorakit.errors import LorakitError
from lorakit.quantized import packed as packed_layers


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """A configuration from a dictionary with its peft_type."""
    return from_dict(config_dict)


def get_peft_model(model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", mixed: bool = False, autocast_adapter_dtype: bool = True,
                   revision: str | None = None, low_cpu_mem_usage: bool = False) -> PeftModel:
    """Puts a new adapter on the model, in place, and returns the PeftModel of its task around it.

    Adapters are at least float32 and start with their values, whatever autocast_adapter_dtype and low_cpu_mem_usage say.
    """
    if mixed:
        raise LorakitError("get_peft_model: mixed=True is not there yet in lorakit.compat.peft; several LoRA adapters need it not")
    if isinstance(peft_config, PeftConfig):
        name = vars(model).get("name_or_path") or None
        if peft_config.base_model_name_or_path not in (None, name):
            warnings.warn(f"the configuration was made for `{peft_config.base_model_name_or_path}`; it is of `{name}` now", stacklevel=2)
        peft_config.base_model_name_or_path, peft_config.revision = name, revision or peft_config.revision
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(getattr(peft_config, "task_type", None), PeftModel)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def inject_adapter_in_model(peft_config: PeftConfig, model: nn.Module, adapter_name: str = "default", low_cpu_mem_usage: bool = False,
                            state_dict: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Puts an adapter on the model, in place, and returns the very model; `state_dict` names the targets by its keys."""
    inject(model, adapter_name, peft_config, state_dict)
    model.peft_config = {**(getattr(model, "peft_config", None) or {}), adapter_name: peft_config}
    return model


def prepare_model_for_kbit_training(model: nn.Module, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict | None = None,
                                    auto_clear_cache: bool = True) -> nn.Module:
    """Freezes the model and casts 16-bit weights to float32; on a quantised one also turns gradient checkpointing on."""
    kbit = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False) or bool(packed_layers(model))
    packed = getattr(model, "quantization_method", None) in ("gptq", "aqlm", "eetq", "torchao", "hqq") or getattr(model, "hqq_quantized", False)
    for p in model.parameters():
        p.requires_grad_(False)
        if not packed and p.dtype in (torch.float16, torch.bfloat16) and type(p).__name__ != "Params4bit":
            p.data = p.data.float()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if (kbit or packed) and use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {}
        if options.get("use_reentrant", True):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """What trains to float32, all else to `dtype`."""
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)


# The base and its adapter in one call

class _Auto:
    auto: str | None = None  # transformers' class for the base
    wrapper: type[PeftModel] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any):
        raise LorakitError(f"{type(self).__name__} is not made by itself; mend: {type(self).__name__}.from_pretrained(path)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, adapter_name: str = "default", is_trainable: bool = False,
                        config: PeftConfig | None = None, revision: str | None = None, import_allowlist: list[str] | None = None, **kwargs: Any) -> PeftModel:
        """Loads the base that the adapter's configuration names, and the adapter on it; other options go to the base."""
        hub = {k: kwargs[k] for k in ("subfolder", "cache_dir", "token", "local_files_only", "force_download") if k in kwargs}
        path = locate(pretrained_model_name_or_path, revision=revision, **hub)
        said = PeftConfig.from_pretrained(path)
        base = cls._base(said, path, import_allowlist or ["transformers"])
        if said.base_model_name_or_path is None:
            raise LorakitError(f"{path}: the adapter's configuration names no base model; mend: load the base and use PeftModel.from_pretrained(base, path)")
        kwargs = {k: v for k, v in kwargs.items() if k != "subfolder"}
        check_base = kwargs.pop("check_base", True)
        model = base.from_pretrained(said.base_model_name_or_path, **({"revision": said.revision} if said.revision else {}), **kwargs)
        if (path / "tokenizer_config.json").is_file() and hasattr(model, "get_input_embeddings"):
            size = len(transformers.AutoTokenizer.from_pretrained(path))
            if size > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(size)
        return cls.wrapper.from_pretrained(model, path, adapter_name, is_trainable, config, check_base=check_base)

    @classmethod
    def _base(cls, said: PeftConfig, path: Path, allowed: list[str]) -> Any:
        if said.task_type is not None and said.task_type != cls.wrapper.task:
            want = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[said.task_type].__name__.replace("Peft", "AutoPeft", 1)
            raise LorakitError(f"{path}: the adapter is for {said.task_type.value}; mend: {want}.from_pretrained")
        if cls.auto is not None:
            return getattr(transformers, cls.auto)
        library, name = (said.auto_mapping or {}).get("parent_library"), (said.auto_mapping or {}).get("base_model_class")
        if not library:
            raise LorakitError(f"{path}: the adapter's configuration does not name the base's class; mend: load the base and use PeftModel.from_pretrained")
        if not any(library == a or library.startswith(f"{a}.") for a in allowed):
            raise LorakitError(f"{path}: the base's class comes from `{library}`, which is not imported unasked; mend: import_allowlist=[{library!r}]")
        return getattr(importlib.import_module(library), name)


class AutoPeftModel(_Auto):
    """The base's class is the one the adapter was saved with."""


class AutoPeftModelForCausalLM(_Auto):
    auto, wrapper = "AutoModelForCausalLM", PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(_Auto):
    auto, wrapper = "AutoModelForSeq2SeqLM", PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_Auto):
    auto, wrapper = "AutoModelForSequenceClassification", PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_Auto):
    auto, wrapper = "AutoModelForTokenClassification", PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(_Auto):
    auto, wrapper = "AutoModelForQuestionAnswering", PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_Auto):
    auto, wrapper = "AutoModel", PeftModelForFeatureExtraction


__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "AdaLoraConfig",
    "AdaptionPromptConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "CPTConfig",
    "CordaConfig",
    "EvaConfig",
    "FourierFTConfig",
    "HRAConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "MissConfig",
    "OFTConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PolyConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "VBLoRAConfig",
    "VeraConfig",
    "cast_mixed_precision_params",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "set_peft_model_state_dict",
]
