"""Quantised bases in transformers' own loader and files: `from_pretrained` packs layer by layer, and reads what was saved packed.

    AutoModelForCausalLM.from_pretrained(path, quantization_config=Quantize("nf4"))

`quantization_config` in config.json: {"quant_method": "lorakit", "packed": [{"scheme": {…}, "layers": […]}, …]}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorakit.errors import LorakitError
from lorakit.quantized import described, own_weights, pack, prepare
from lorakit.stores.scheme import Scheme, scheme_of
from lorakit.targets import select, weight_in

METHOD = "lorakit"


@register_quantization_config(METHOD)
class Quantize(QuantizationConfigMixin):
    """How to pack a model while it is loaded, or how one on disk is packed. Options as `lorakit.quantize`; packed: [{scheme, layers}] instead."""

    def __init__(self, scheme: str | Mapping[str, Any] | Scheme = "nf4", target_modules: str | Sequence[str] = "all-linear",
                 exclude_modules: str | Sequence[str] = (), packed: Sequence[Mapping[str, Any]] = (), quant_method: str = METHOD, **_: Any):
        self.quant_method, self.packed = quant_method, list(packed)
        self.scheme = scheme_of(scheme).to_dict()
        self.target_modules, self.exclude_modules = target_modules, exclude_modules

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "packed": self.packed}


def write_config(model: nn.Module) -> None:
    """Writes into the model's configuration what is packed in it, so that `save_pretrained` and a receipt say so."""
    config, now = model.config, described(model)
    if now:
        config.quantization_config = Quantize(packed=now)
    elif getattr(getattr(config, "quantization_config", None), "quant_method", None) == METHOD:
        del config.quantization_config


class _Pack(ConversionOps):
    """One weight of the checkpoint, packed into its layer as soon as it is read."""

    def __init__(self, quantizer: Loader):
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict, full_layer_name=None, model=None, missing_keys=None, **kwargs):
        [value] = input_dict.values()
        value = value[0] if isinstance(value, list) else value
        path = full_layer_name.removesuffix(".weight")
        module = model.get_submodule(path)
        module._parameters["weight"] = nn.Parameter(value, requires_grad=False)
        pack(module, self.quantizer.plan[path], path)
        module._is_hf_initialized = True
        missing_keys.discard(full_layer_name)
        return {}


@register_quantizer(METHOD)
class Loader(HfQuantizer):
    """transformers' side of it."""

    requires_calibration = False

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.plan = {path: scheme_of(group["scheme"]) for group in quantization_config.packed for path in group["layers"]}

    def _process_model_before_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        if self.pre_quantized:
            for path, scheme in self.plan.items():
                prepare(model.get_submodule(path), scheme, path)
        elif not self.plan:
            self.plan = dict.fromkeys(own_weights(model, select(model, config.target_modules, config.exclude_modules)), scheme_of(config.scheme))

    def param_needs_quantization(self, model, param_name, **kwargs):
        return param_name.endswith(".weight") and param_name.removesuffix(".weight") in self.plan

    def get_quantize_ops(self):
        return _Pack(self)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():  # packed layers are ordinary modules: they move, save and train adapters like others
            vars(module).pop("is_quantized", None)
        model.hf_quantizer = None
        vars(model).pop("quantization_method", None)
        write_config(model)
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True


@dataclass(frozen=True)
class OnDisk:
    """A layer's weight from before it was packed, read when it is asked for."""

    base: str
    path: str
    revision: str | None = None

    def __call__(self) -> Tensor:
        from safetensors import safe_open

        files = files_of(self.base, self.revision)
        try:
            name = weight_in(self.path, files)
        except LorakitError as e:
            raise LorakitError(f"{self.base}: {e}, so its values from before quantisation are not known; mend: lorakit.quantize(model, …, keep=True) on a "
                               "model that was loaded unquantised") from None
        with safe_open(files[name], "pt") as f:
            return f.get_tensor(name)


def files_of(base: str, revision: str | None) -> dict[str, str]:
    """Tensor -> the file that holds it."""
    from safetensors import safe_open

    index = cached_file(base, "model.safetensors.index.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        table = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return {k: str(cached_file(base, f, revision=revision)) for k, f in table.items()}
    one = cached_file(base, "model.safetensors", revision=revision, _raise_exceptions_for_missing_entries=False)
    if one is None:
        return {}
    with safe_open(one, "pt") as f:
        return dict.fromkeys(f.keys(), str(one))
