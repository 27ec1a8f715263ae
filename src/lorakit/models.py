"""Loading base models and tokenizers from a folder or a hub name; `embedded` is the small model that ships with lorakit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.errors import LorakitError, near

EMBEDDED = Path(__file__).parent / "assets" / "pylm"
TASKS = {"causal-lm": "AutoModelForCausalLM", "sequence-classification": "AutoModelForSequenceClassification",
         "seq2seq": "AutoModelForSeq2SeqLM", "features": "AutoModel"}
_DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
           "float16": torch.float16, "fp16": torch.float16}


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | str:
    """A torch dtype from its usual names; None and "auto" leave the checkpoint's own."""
    if name is None or name == "auto":
        return "auto"
    if isinstance(name, torch.dtype):
        return name
    if name not in _DTYPES:
        raise LorakitError(f"unknown dtype `{name}`{near(name, _DTYPES)}")
    return _DTYPES[name]


def where(base: str | Path) -> str:
    """The path or hub name to hand to transformers. LorakitError for a folder that is not there or holds no model."""
    text = str(base)
    if text == "embedded":
        return str(EMBEDDED)
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = "; it holds an adapter: name its base model instead" if (path / "adapter_config.json").is_file() else ""
            raise LorakitError(f"{path} holds no model: there is no config.json{hint}")
        return str(path)
    if path.exists() or text.startswith(("/", "./", "../", "~")) or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", text):
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise LorakitError(f"there is no model folder {path}{near(path.name, beside, listing=False) if beside else ''}")
    return text


def load_base(base: str | Path, task: str = "causal-lm", *, dtype: str | torch.dtype | None = None, revision: str | None = None,
              trust_remote_code: bool = False, quantize: str | Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None, **config: Any) -> nn.Module:
    """A transformers model for a task, in evaluation mode. Extra arguments go into its configuration (num_labels, …).

    quantize: how the linear layers are packed while they are read, one after the other ("nf4", {name: int4, group: 32}, …, or
    [{scheme, layers}, …]). What was saved packed is read as it is, bitsandbytes' NF4 without bitsandbytes.
    """
    import transformers

    from lorakit.quantized import bitsandbytes, hub, packed  # hub registers how lorakit's packed checkpoints are read

    if task not in TASKS:
        raise LorakitError(f"unknown task `{task}`{near(task, TASKS)}")
    name = where(base)
    there = _quantized(name, revision)
    if quantize is not None and there:
        if isinstance(quantize, str | Mapping):
            raise LorakitError(f"{name} is quantised already ({there.get('quant_method')}); mend: leave `quantize` out, or name the base from before")
        quantize = None
    if quantize is not None:
        config["quantization_config"] = hub.Quantize(quantize) if isinstance(quantize, str | Mapping) else hub.Quantize(packed=quantize)
    cls, options = getattr(transformers, TASKS[task]), {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        if bitsandbytes.readable(there):
            model = bitsandbytes.load(cls, name, dtype_of(dtype), options, config)
        else:
            model = cls.from_pretrained(name, dtype=dtype_of(dtype), **options, **config).eval()
    except (OSError, ValueError, KeyError, ImportError, NotImplementedError) as e:  # a quantised one may need a library, or more than transformers has
        raise LorakitError(f"could not load the base model {name} for {task}: {_first(e)}") from e
    if quantize is not None:
        for path, layer in packed(model).items():
            layer.original = hub.OnDisk(name, path, revision)
    return model


def skeleton(base: str | Path, task: str = "causal-lm") -> nn.Module:
    """The model of a base without its values, on the meta device."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(where(base))
    except (OSError, ValueError) as e:
        raise LorakitError(f"could not read the configuration of {base}: {_first(e)}") from e
    with torch.device("meta"):
        return getattr(transformers, TASKS[task]).from_config(config)


def _quantized(name: str, revision: str | None) -> dict[str, Any]:
    """How a checkpoint is quantised, by its configuration; {} where it is not."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError):
        return {}
    return config.get("quantization_config") or {}


def load_tokenizer(base: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a base model, with a pad token (the end token where it has none)."""
    from transformers import AutoTokenizer

    name = where(base)
    try:
        tok = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as e:
        raise LorakitError(f"could not load a tokenizer from {name}: {_first(e)}") from e
    if tok.pad_token_id is None and tok.eos_token is not None:
        tok.pad_token = tok.eos_token
    return tok


def task_of(class_name: str) -> str:
    """The task whose model has this class name; causal-lm where it cannot be told."""
    kinds = {"ForSequenceClassification": "sequence-classification", "ForConditionalGeneration": "seq2seq", "Model": "features"}
    return next((t for end, t in kinds.items() if class_name.endswith(end) and not class_name.endswith("LMHeadModel")), "causal-lm")


def _first(e: Exception) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[0] if lines else type(e).__name__
