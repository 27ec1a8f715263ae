"""bitsandbytes' NF4 checkpoints (transformers' `load_in_4bit`) as our own packed layers, to the bit and without bitsandbytes; `load_base` reads them so.

Beside each weight `w` lie `w.absmax`, `w.quant_map` and `w.quant_state.bitsandbytes__nf4`, with double quantisation `w.nested_absmax` and
`w.nested_quant_map`; what is no tensor is JSON, as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.stores.layer import PREFIX
from lorakit.stores.normal_float import DYNAMIC, NESTED, NF4, NormalFloat
from lorakit.stores.scheme import Parts

STATE = ".quant_state.bitsandbytes__"
BESIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def readable(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is of an NF4 checkpoint that is read here."""
    return config.get("quant_method") == "bitsandbytes" and bool(config.get("load_in_4bit")) and config.get("bnb_4bit_quant_type") == "nf4"


def parts_of(tensors: Mapping[str, Tensor], name: str) -> tuple[NormalFloat, Parts]:
    """Our scheme and parts of one weight of such a checkpoint, in the same memory. LorakitError for FP4, or tables that are not NF4's."""
    told = next((k for k in tensors if k.startswith(name + STATE)), None)
    if told is None:
        raise LorakitError(f"{name} is no 4-bit weight of bitsandbytes: there is no {name}{STATE}nf4")
    if told != f"{name}{STATE}nf4":
        raise LorakitError(f"{name} is kept as {told.removeprefix(name + STATE)}, and only nf4 is read without bitsandbytes; mend: load it with bitsandbytes")
    state = json.loads(bytes(tensors[told].tolist()))
    nested = f"{name}.nested_absmax" in tensors
    tables = {"quant_map": NF4} | ({"nested_quant_map": DYNAMIC} if nested else {})
    if any(not torch.equal(tensors[f"{name}.{k}"].float(), torch.tensor(v)) for k, v in tables.items()) or (nested and state["nested_blocksize"] != NESTED):
        raise LorakitError(f"{name}: its codes stand for other numbers than bitsandbytes' NF4; mend: load it with the library that wrote it")
    absmax = tensors[f"{name}.absmax"]
    parts = {"codes": tensors[name].contiguous().view(torch.uint8).view(-1), "absmax": absmax if nested else absmax.float()}
    if nested:
        parts |= {"nested_absmax": tensors[f"{name}.nested_absmax"].float(), "offset": torch.tensor(state["nested_offset"], dtype=torch.float32)}
    return NormalFloat(4, state["blocksize"], nested), parts


def translated(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The tensors of a checkpoint with our parts in place of bitsandbytes', and what is packed in it, as `Quantize(packed=…)` takes it."""
    names = sorted(k.partition(STATE)[0] for k in tensors if STATE in k)
    gone = {f"{n}.{k}" for n in names for k in BESIDE} | {k for k in tensors if STATE in k} | set(names)
    out = {k: t for k, t in tensors.items() if k not in gone}
    by: dict[NormalFloat, list[str]] = {}
    for name in names:
        scheme, parts = parts_of(tensors, name)
        path = name.removesuffix(".weight")
        out |= {f"{path}.{PREFIX}{k}": t for k, t in parts.items()}
        by.setdefault(scheme, []).append(path)
    return out, [{"scheme": s.to_dict(), "layers": paths} for s, paths in by.items()]


def load(cls: Any, base: str, dtype: Any, options: Mapping[str, Any], config: Mapping[str, Any]) -> nn.Module:
    """The model of such a checkpoint by an Auto class of transformers, in evaluation mode. LorakitError where it holds no safetensors."""
    from safetensors import safe_open
    from transformers import AutoConfig, GenerationConfig

    from lorakit.quantized.hub import Quantize, files_of

    files, tensors = files_of(base, options["revision"]), {}
    if not files:
        raise LorakitError(f"{base} holds no safetensors, and only those of bitsandbytes' checkpoints are read here; mend: load it with bitsandbytes, save "
                           "it again (model.save_pretrained)")
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as f:
            tensors |= {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    told = AutoConfig.from_pretrained(base, **options, **config)
    tensors, packed = translated(tensors)
    with torch.device("meta"):
        kind = type(cls.from_config(told, trust_remote_code=options["trust_remote_code"]))
    told.quantization_config = Quantize(packed=packed).to_dict()
    model = kind.from_pretrained(None, config=told, state_dict=tensors, dtype=told.dtype if dtype == "auto" else dtype).eval()
    model.config._name_or_path = base
    if model.can_generate():
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(base, revision=options["revision"])
    return model
