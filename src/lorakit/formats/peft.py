"""The PEFT adapter folder: `adapter_config.json` and `adapter_model.safetensors`, read and written exactly.

Keys are `base_model.model.<module path>.<leaf key>`, without the adapter's name; a convolution's factors have the layer's
kernel shape. What PEFT has no configuration for is written in the same layout with `peft_type: LORAKIT` and the spec beside
it, which PEFT refuses by name. The mapping of each method's fields lives in the method's own file (`to_peft`, `from_peft`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.host import Slot
from lorakit.method import Method, method_from_dict, method_from_peft
from lorakit.methods.full import Full
from lorakit.spec import Spec, matched

FORMAT = 1
CONFIG, TENSORS, RECEIPT = "adapter_config.json", "adapter_model.safetensors", "receipt.json"
PREFIX = "base_model.model."
OWN = "LORAKIT"
# what PEFT 0.21 writes for a LoRA that uses none of these; what we cannot honour yet must have this value
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None, "arrow_config": None, "auto_mapping": None, "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "kasa_config": None, "layer_replication": None, "loftq_config": {},
    "lora_bias": False, "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core",
    "monteclora_config": None, "qalora_group_size": 16, "target_parameters": None, "trainable_token_indices": None,
    "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False, "velora_config": None,
}
MATHS = ("alora_invocation_tokens", "arrow_config", "bias", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
         "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config")


def _key(path: str, slot: Slot, name: str, leaf: str) -> str:
    key = slot.methods[name].key(leaf, slot.site.lookup).removeprefix("modules_to_save.")
    return f"{PREFIX}{path}.{key}" if path else f"base_model.{key}"


def expected(slots: Mapping[str, Slot], name: str) -> dict[str, tuple[Slot, str]]:
    """File key -> (slot, leaf) for every tensor this adapter has on this model."""
    return {_key("" if slot.methods[name].leaves[leaf].shared else path, slot, name, leaf): (slot, leaf)
            for path, slot in slots.items() for leaf in slot.shapes(name)}


def config_of(spec: Spec, methods: Mapping[str, Method], base: Mapping[str, Any], all_paths: list[str], own: bool = False) -> dict[str, Any]:
    """adapter_config.json for methods at paths: PEFT's where it can say this, else, or where asked to, our own."""
    adapted = {p: m for p, m in methods.items() if not m.replaces}
    saved = [p for p, m in methods.items() if m.replaces]
    common = {"base_model_name_or_path": base.get("name"), "revision": base.get("revision"), "task_type": base.get("task_type"),
              "inference_mode": True}
    configs = {p: m.to_peft() for p, m in adapted.items()}
    if own or not adapted or any(c is None for c in configs.values()) or len({_kind(c) for c in configs.values()}) > 1:
        return common | {"peft_type": OWN, "lorakit_format": FORMAT, "modules": {p: m.to_dict() for p, m in methods.items()}}
    most = {k: Counter(c[k] for c in configs.values()).most_common(1)[0][0] for k in ("r", "lora_alpha") if k in next(iter(configs.values()))}
    return DEFAULTS | common | next(iter(configs.values())) | most | {
        "lora_dropout": spec.dropout, "init_lora_weights": True, "fan_in_fan_out": base.get("transposed", False),
        "target_modules": _shortest(list(adapted), all_paths), "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
        "modules_to_save": saved or None,
        # anchored: PEFT lets a pattern match at the end of a path, so a short path must not catch a longer one
        "rank_pattern": {"^" + p: c["r"] for p, c in configs.items() if c.get("r") != most.get("r")},
        "alpha_pattern": {"^" + p: c["lora_alpha"] for p, c in configs.items() if c.get("lora_alpha") != most.get("lora_alpha")},
        "peft_version": "0.21.2"}


def _kind(config: dict[str, Any]) -> str:
    return str(sorted((k, v) for k, v in config.items() if k not in ("r", "lora_alpha")))


def _shortest(adapted: list[str], every: list[str]) -> list[str]:
    """Last names if they select exactly these modules among `every`, else whole paths."""
    last = {p.rsplit(".", 1)[-1] for p in adapted}
    return sorted(last) if {p for p in every if p.rsplit(".", 1)[-1] in last} == set(adapted) else sorted(adapted)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. LorakitError when it is missing, truncated or something else."""
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin")
        hint = "; there is a pickle (adapter_model.bin), which lorakit never opens: convert it to safetensors first" if pickled.exists() else ""
        raise LorakitError(f"{path.parent}: there is no {path.name}{hint}")
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, RuntimeError) as e:
        raise LorakitError(f"{path} is truncated or not a safetensors file ({path.stat().st_size} bytes): {e}") from None


def methods_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path) -> dict[str, Method]:
    """Path -> method, from what the file holds: the tensors' own paths, and the configuration for their meaning."""
    if config.get("peft_type") == OWN:
        if config.get("lorakit_format", 0) > FORMAT:
            raise LorakitError(f"{where}: written in format {config['lorakit_format']}, this lorakit reads up to {FORMAT}; mend: upgrade lorakit")
        return {p: method_from_dict(m) for p, m in config["modules"].items()}
    for k in MATHS:
        if config.get(k, DEFAULTS[k]) not in (DEFAULTS[k], None, {}, []):
            raise LorakitError(f"{where}: the adapter uses `{k}: {config[k]}`, which this version of lorakit does not carry out")
    try:
        method = method_from_peft(dict(config))
    except LorakitError as e:
        raise LorakitError(f"{where}: {e}") from None
    saved = set(config.get("modules_to_save") or ())
    tails = sorted({method.key(leaf, lookup) for leaf in method.leaves for lookup in (False, True)}, key=len, reverse=True)
    paths = dict.fromkeys(p for k in tensors if (p := _path(k, tails)) is not None)
    plan = dict.fromkeys(paths, method)
    for what, field in (("rank_pattern", "r"), ("alpha_pattern", "alpha")):
        for p, v in matched(f"{where}: {what}", config.get(what) or {}, list(paths), strict=False).items():
            plan[p] = plan[p].having(**{field: float(v) if field == "alpha" else v})
    whole = {k.removeprefix(PREFIX).rpartition(".")[0] for k in tensors if any(_inside(k, s) for s in saved)}
    return plan | dict.fromkeys(sorted(whole - set(plan)), Full())


def _inside(key: str, module: str) -> bool:
    path = f".{key.removeprefix(PREFIX)}"
    return f".{module}." in path and not any(part.startswith("lora_") for part in path.split("."))


def _path(key: str, tails: list[str]) -> str | None:
    if not key.startswith(PREFIX):
        return None
    body = key.removeprefix(PREFIX)
    return next((body.removesuffix("." + t) for t in tails if body.endswith("." + t)), None)
