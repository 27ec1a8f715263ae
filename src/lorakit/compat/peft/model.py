"""PeftModel: PEFT's object around a base that carries lorakit's adapters. The base is changed in place, as there and here.

    PeftModel                 save, load, set_adapter, disable_adapter, mixed batches
      .base_model             LoraModel: merge, unload, add_weighted_adapter
        .model                the base; attributes that neither has come from here

Where the package peft is installed, PeftModel is a subclass of its PeftModel, so that transformers and TRL treat it alike;
none of its code runs.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers.utils import PushToHubMixin

import lorakit
from lorakit import host
from lorakit.compat.peft import weights as files
from lorakit.compat.peft.config import PeftConfig, TaskType, from_dict, locate
from lorakit.compat.peft.tuner import LoraModel, TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from lorakit.errors import LorakitError, near
from lorakit.formats import folder
from lorakit.formats.files import read_json
from lorakit.formats.peft import CONFIG

BASE = "__base__"  # in adapter_names: the base without an adapter
SPECIAL = frozenset({"adapter_names", "alora_offsets"})


def _parents() -> tuple[type, ...]:
    if importlib.util.find_spec("peft") is None:
        return PushToHubMixin, nn.Module
    import peft

    return (peft.PeftModel,)


class PeftModel(*_parents()):
    """A base with one or more LoRA adapters. `from_pretrained` and `get_peft_model` make the class of the task."""

    task: str | None = None
    order: tuple[str, ...] = ()  # what positional arguments of forward mean

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", autocast_adapter_dtype: bool = True,
                 low_cpu_mem_usage: bool = False, **made: Any):
        nn.Module.__init__(self)
        if self.task and peft_config.task_type is None:
            peft_config.task_type = TaskType(self.task)
        self.peft_type, self.special_peft_forward_args, self._is_prompt_learning = peft_config.peft_type, set(SPECIAL), False
        self.base_model = LoraModel(model, peft_config, adapter_name, **made)
        names = [k for k in ("is_activation_checkpointing", "is_gradient_checkpointing") if hasattr(type(model), k)]
        if not names or getattr(model, names[0]):
            self.prepare_model_for_gradient_checkpointing(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self.base_model.active_adapter

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        return self.base_model._aside is None and bool(self.active_adapters)

    @property
    def modules_to_save(self) -> set[str] | None:
        return {n for c in self.peft_config.values() for n in getattr(c, "modules_to_save", None) or ()} or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.base_model, "dtype", None)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> type:
        return type(self.get_base_model())

    # Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward through the active adapters; `adapter_names` gives one adapter for each row, "__base__" for none."""
        self.base_model.sync()
        self._check_head(bool(kwargs.get("fused_lm_head")))
        if self.training and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise LorakitError("accelerate saves a sharded PeftModel through functions of the package peft, which see no adapter of ours, so checkpoints "
                               "would be empty; mend: lorakit.training.AdapterTrainer on model.get_base_model()")
        if self.order:
            args, kwargs = (), kwargs | dict(zip(self.order, args, strict=False))
        with self._given(kwargs):
            return self._forward(*args, **kwargs)

    @contextmanager
    def _given(self, kwargs: dict[str, Any]) -> Iterator[None]:
        """Takes out of the arguments what methods ask of a batch beside the base's inputs (task_ids), and gives it to them inside."""
        mine = {k: kwargs.pop(k) for c in list(self.peft_config.values()) for k in c.asks if k in kwargs}
        if not {k: v for k, v in mine.items() if v is not None}:
            yield
            return
        with lorakit.given(self.get_base_model(), **mine):
            yield

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if SPECIAL.isdisjoint(kwargs):
            return self.base_model(*args, **kwargs)
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.base_model(*args, **{k: v for k, v in kwargs.items() if k not in SPECIAL})

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.base_model.sync()
        with self._given(kwargs), self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model().generate(*args, **{k: v for k, v in kwargs.items() if k not in SPECIAL})

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Sequence[str] | None = None, alora_offsets: Any = None, **kwargs: Any) -> Iterator[None]:
        """Inside, row n of the batch goes through adapter_names[n]."""
        if alora_offsets is not None:
            raise LorakitError("alora_offsets: aLoRA is not there yet in lorakit.compat.peft")
        if adapter_names is None or not self.has_active_enabled_adapter:
            yield
            return
        if self.training:
            raise LorakitError("adapter_names are for inference, and the model is training; mend: model.eval() first")
        with lorakit.rows(self.get_base_model(), [None if n == BASE else n for n in adapter_names]):
            yield

    def _check_head(self, fused: bool = False) -> None:
        base = self.get_base_model()
        replaced = "forward" in vars(base) and "_old_forward" not in vars(base)  # accelerate's hooks call the forward they replace
        if not replaced and not fused:
            return
        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        if isinstance(head, host.Host):
            raise LorakitError("this trainer computes its loss from the output head's weight without calling it, so the adapter on the head "
                               "would be skipped silently; mend: leave the head out of target_modules and modules_to_save (exclude_modules=['lm_head'])")

    def add_model_tags(self, tags: Sequence[str] | str) -> None:
        """The base's; TRL calls it once its trainer is made, which is when a head it would skip is refused."""
        self._check_head()
        if hasattr(self.get_base_model(), "add_model_tags"):
            self.get_base_model().add_model_tags(tags)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Gradient checkpointing needs an input with a gradient, and nothing before the first adapter has one."""
        if any(getattr(model, k, False) for k in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")):
            return model
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
        return model

    _prepare_model_for_gradient_checkpointing = prepare_model_for_gradient_checkpointing

    # Adapters

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base alone, inside a `with` block."""
        off = self.base_model._aside is not None
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            if not off:
                self.base_model.enable_adapter_layers()

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        self.base_model.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False, autocast_adapter_dtype: bool = True) -> None:
        """Another adapter, neither active nor training yet.

        TRL makes the reference of its trainers so: an adapter `ref` from the very configuration of `default`, into which it
        copies parameters by names that end in `.weight`. Ours do not, so that one is made a copy here.
        """
        self.base_model.add_adapter(adapter_name, peft_config)
        if adapter_name == "ref" and peft_config is self.peft_config.get("default"):
            files.set_peft_model_state_dict(self, files.get_peft_model_state_dict(self, adapter_name="default"), "ref")

    def delete_adapter(self, adapter_name: str) -> None:
        self.base_model.delete_adapter(adapter_name)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        return get_model_status(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(numbers that train, all numbers)."""
        return lorakit.trainable(self)

    def print_trainable_parameters(self) -> None:
        some, every = self.get_nb_trainable_parameters()
        print(f"trainable params: {some:,d} || all params: {every:,d} || trainable%: {100 * some / every:.4f}")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a product of two factors on every layer."""
        return all(s.methods[adapter_name].two(s.first(adapter_name)) is not None for s in host.slots(self.get_base_model(), adapter_name).values())

    # Files

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True, selected_adapters: Sequence[str] | None = None,
                        save_embedding_layers: str | bool = "auto", is_main_process: bool = True, path_initial_model_for_weight_conversion: str | None = None,
                        **kwargs: Any) -> None:
        """Each adapter as a PEFT folder with a receipt: `default` in the folder itself, the others in one of their name."""
        files.no_embeddings(save_embedding_layers)
        if path_initial_model_for_weight_conversion is not None:
            raise LorakitError("path_initial_model_for_weight_conversion is not there yet in lorakit.compat.peft; a start that changes the base is "
                               "converted by saving here, without it")
        if not safe_serialization:
            warnings.warn("safe_serialization=False: lorakit writes no pickles; the adapter is saved as safetensors", stacklevel=2)
        where = Path(save_directory)
        if where.is_file():
            raise LorakitError(f"{where} is a file; mend: name a folder")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        for name in names:
            if name not in self.peft_config:
                raise LorakitError(f"selected_adapters: the model has no adapter `{name}`{near(name, self.peft_config)}")
        for name in names if is_main_process else ():
            path = where if name == "default" else where / name
            files.save_folder(self, self.get_base_model(), name, path, self.peft_config[name], kwargs.get("state_dict"))
        if is_main_process:
            self.create_or_update_model_card(where)

    @classmethod
    def from_pretrained(cls, model: nn.Module, model_id: str | Path, adapter_name: str = "default", is_trainable: bool = False,
                        config: PeftConfig | None = None, autocast_adapter_dtype: bool = True, ephemeral_gpu_offload: bool = False,
                        low_cpu_mem_usage: bool = False, key_mapping: Mapping[str, str] | None = None, check_base: bool = True, **kwargs: Any) -> PeftModel:
        """The base with a saved adapter, from a folder or the Hub. Every tensor must find its place; `check_base`: so must the base's fingerprint."""
        _no_key_mapping(key_mapping)
        path = locate(model_id, kwargs.get("subfolder"), **{k: v for k, v in kwargs.items() if k != "subfolder"})
        read = from_dict(read_json(path / CONFIG), str(path / CONFIG))
        if config is not None and not isinstance(config, PeftConfig):
            raise LorakitError(f"config: must be a PeftConfig of lorakit.compat.peft, not {type(config).__module__}.{type(config).__name__}")
        own = config is not None and config.to_dict() | {"inference_mode": True} != read.to_dict() | {"inference_mode": True}
        config = read if config is None else config
        config.inference_mode = not is_trainable
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, cls)
        new = kind(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, source=path, check_base=check_base, own_config=own)
        return new if is_trainable else new.eval()

    def load_adapter(self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, torch_device: str | None = None,
                     autocast_adapter_dtype: bool = True, ephemeral_gpu_offload: bool = False, low_cpu_mem_usage: bool = False,
                     key_mapping: Mapping[str, str] | None = None, check_base: bool = True, **kwargs: Any) -> _IncompatibleKeys:
        """Another saved adapter, beside those in effect; or new values for one the model has."""
        _no_key_mapping(key_mapping)
        path, base = locate(model_id, kwargs.get("subfolder"), **{k: v for k, v in kwargs.items() if k != "subfolder"}), self.get_base_model()
        if adapter_name in self.peft_config:
            folder.fill(base, adapter_name, folder.Folder(path))
        else:
            config = from_dict(read_json(path / CONFIG), str(path / CONFIG))
            config.inference_mode = not is_trainable
            state = host.find_state(base)
            active = state.active if state else {}
            self.base_model.put(adapter_name, config, source=path, check_base=check_base)
            host.state_of(base).active = active
        if not is_trainable:
            self.eval()
        return _IncompatibleKeys([], [])

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """A README.md that says what the folder is; one that is there keeps its text."""
        from huggingface_hub import ModelCard, ModelCardData

        file, base = Path(output_dir) / "README.md", self.get_base_model()
        name = getattr(base, "name_or_path", None)
        card = ModelCard.load(file) if file.is_file() else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n\n# Adapter\n\nWritten by lorakit "
                                                                     "in PEFT's format; `receipt.json` says of which base, and how to verify it.\n")
        card.data["library_name"] = "peft"
        tags = {"lora", *(["transformers"] if hasattr(base, "config") else []), *([f"base_model:adapter:{name}"] if name else []),
                *(getattr(base, "model_tags", None) or ())}
        card.data["tags"] = sorted(tags | set(card.data.get("tags") or ()))
        if name:
            card.data["base_model"] = name
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        card.save(file)


def _no_key_mapping(key_mapping: Mapping[str, str] | None) -> None:
    if key_mapping:
        raise LorakitError("key_mapping is not there yet in lorakit.compat.peft; mend: rename the keys of the file's tensors")


_TEXT = ("input_ids", "attention_mask", "inputs_embeds")
_OUT = ("output_attentions", "output_hidden_states", "return_dict")


class PeftModelForCausalLM(PeftModel):
    task, order = "CAUSAL_LM", (*_TEXT, "labels", *_OUT)


class PeftModelForSequenceClassification(PeftModel):
    """`classifier` and `score` are trained whole and saved with the adapter."""

    task, order = "SEQ_CLS", (*_TEXT, "labels", *_OUT)


class PeftModelForTokenClassification(PeftModel):
    """`classifier` and `score` are trained whole and saved with the adapter."""

    task, order = "TOKEN_CLS", (*_TEXT, "labels", *_OUT)


class PeftModelForSeq2SeqLM(PeftModel):
    task, order = "SEQ_2_SEQ_LM", (*_TEXT, "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "labels", *_OUT)


class PeftModelForQuestionAnswering(PeftModel):
    """`qa_outputs` is trained whole and saved with the adapter."""

    task, order = "QUESTION_ANS", ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "start_positions", "end_positions", *_OUT)


class PeftModelForFeatureExtraction(PeftModel):
    task, order = "FEATURE_EXTRACTION", (*_TEXT, *_OUT)


TASKS = (PeftModelForCausalLM, PeftModelForSequenceClassification, PeftModelForTokenClassification, PeftModelForSeq2SeqLM, PeftModelForQuestionAnswering,
         PeftModelForFeatureExtraction)
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {c.task: c for c in TASKS}
