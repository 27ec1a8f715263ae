"""PEFT's configurations, and what they mean here: `plan_of` turns a LoraConfig into a Spec and a plan for one model."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.utils import PushToHubMixin

from lorakit.compat.peft.start_configs import MADE, CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, made_of
from lorakit.errors import LorakitError, near
from lorakit.formats.files import read_json
from lorakit.formats.peft import CONFIG, OWN, RECEIPT, TENSORS
from lorakit.inits import INITS
from lorakit.method import Method
from lorakit.recipes import compose
from lorakit.spec import Spec

VERSION = "0.21.2"  # the PEFT these names and defaults are those of


class UnknownField(LorakitError, TypeError):
    """A configuration got a field that its kind does not have."""


class TaskType(str, enum.Enum):  # noqa: UP042 (as in PEFT: its text is `TaskType.CAUSAL_LM`)
    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, enum.Enum):  # noqa: UP042
    LORA = "LORA"
    VERA = "VERA"
    LOHA = "LOHA"
    LOKR = "LOKR"
    IA3 = "IA3"
    OFT = "OFT"
    BOFT = "BOFT"
    HRA = "HRA"
    FOURIERFT = "FOURIERFT"
    VBLORA = "VBLORA"
    MISS = "MISS"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    CPT = "CPT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    ADALORA = "ADALORA"
    LN_TUNING = "LN_TUNING"
    POLY = "POLY"
    LORAKIT = OWN  # a folder of lorakit's own, for what PEFT has no configuration for


def locate(model_id: str | Path, subfolder: str | None = None, **options: Any) -> Path:
    """The folder of an adapter: on disk, or from the Hub's cache after a download."""
    path = Path(model_id) / (subfolder or "")
    name = str(model_id)
    if path.is_dir() or Path(model_id).exists() or Path(model_id).is_absolute() or name.startswith(".") or name.count("/") > 1:
        return path
    from huggingface_hub import snapshot_download

    known = {k: v for k, v in options.items() if k in inspect.signature(snapshot_download).parameters and v is not None}
    files = [f"{subfolder}/{f}" if subfolder else f for f in (CONFIG, TENSORS, RECEIPT)]
    try:
        return Path(snapshot_download(name, allow_patterns=files, **known)) / (subfolder or "")
    except Exception as e:
        raise LorakitError(f"{name} is no folder here and could not be had from the Hub: {e}") from e


@dataclass
class PeftConfig(PushToHubMixin):
    """What every configuration says. `from_pretrained` gives the configuration of the adapter's own kind."""

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    is_prompt_learning = False
    is_adaption_prompt = False
    asks: ClassVar[tuple[str, ...]] = ()  # what forward takes beside the base's inputs

    def __new__(cls, *args: Any, **kwargs: Any):
        names = [f.name for f in dataclasses.fields(cls)]
        if other := next((k for k in kwargs if k not in names), None):
            raise UnknownField(f"{cls.__name__} has no field `{other}`{near(other, names)}")
        return super().__new__(cls)

    def allocator(self) -> Any:
        """The hook (`lorakit.hooks`) that moves the budget of ranks in training, where there is one."""
        return None

    def __post_init__(self):
        if self.task_type is not None:
            names = [t.value for t in TaskType]
            if self.task_type not in names:
                raise LorakitError(f"task_type: unknown `{self.task_type}`{near(str(self.task_type), names)}")
            self.task_type = TaskType(self.task_type)
        self.peft_version = self.peft_version or VERSION

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes `adapter_config.json` alone."""
        out = {k: sorted(v) if isinstance(v, set) else v for k, v in self.to_dict().items()}
        out |= {"auto_mapping": kwargs["auto_mapping_dict"]} if kwargs.get("auto_mapping_dict") else {}
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / CONFIG).write_text(json.dumps(out, indent=2, sort_keys=True))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any) -> PeftConfig:
        """The configuration in a folder, or on the Hub."""
        path = locate(pretrained_model_name_or_path, subfolder, **kwargs)
        return from_dict(read_json(path / CONFIG), str(path / CONFIG))


AROUND: dict[str, type[PeftConfig]] = {}  # peft_type -> the configuration of a method that goes around the model


def register(cls: type[PeftConfig]) -> type[PeftConfig]:
    AROUND[cls.kind.value] = cls
    return cls


def from_dict(d: Mapping[str, Any], where: str = "the configuration") -> PeftConfig:
    """A configuration from what a file holds; keys that PEFT 0.21 does not have are named in a warning."""
    kinds = {PeftType.LORA.value: LoraConfig, OWN: PeftConfig} | AROUND
    kind = d.get("peft_type")
    if kind not in kinds:
        raise LorakitError(f"{where}: lorakit.compat.peft has no peft_type `{kind}`{near(str(kind), kinds)}")
    known = {f.name for f in dataclasses.fields(kinds[kind])}
    if kind == PeftType.LORA and (other := sorted(set(d) - known)):
        warnings.warn(f"{where}: unknown keys are left out: {', '.join(other)}", stacklevel=3)
    return kinds[kind](**{k: v for k, v in d.items() if k in known and k != "runtime_config"})


@dataclass
class LoraRuntimeConfig:
    """Accepted; offloading is accelerate's business here."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(PeftConfig):
    """PEFT's LoraConfig: the same fields, the same defaults."""

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.LORA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_parameters, str):
            raise LorakitError("target_parameters must be a list of names or None, not one string")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise LorakitError(f"{name} has no meaning beside target_modules as a string; mend: name the layers in the regular expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise LorakitError("layers_pattern has no meaning without layers_to_transform")
        self._starts()

    def _starts(self) -> None:
        """The settings of a start, as objects; those of another start than this one are named in a warning."""
        for start, (name, cls) in MADE.items():
            value = made_of(name, getattr(self, name))
            if start == self.init_lora_weights:
                if value is None and cls is LoftQConfig:
                    raise LorakitError("LoraConfig: init_lora_weights 'loftq' needs a `loftq_config`; mend: loftq_config=LoftQConfig(loftq_bits=4)")
                value = value or cls()
            elif value is not None:
                warnings.warn(f"LoraConfig: `{name}` is not used, init_lora_weights being {self.init_lora_weights!r}", stacklevel=4)
            setattr(self, name, (dataclasses.asdict(value) if value else {}) if cls is LoftQConfig else value)

    def to_dict(self) -> dict[str, Any]:
        out = super().to_dict()
        out.pop("runtime_config")
        return out


# Options whose function is not there: anything but PEFT's default is refused by name.
ABSENT = ("megatron_config", "velora_config", "alora_invocation_tokens",
          "use_qalora", "monteclora_config", "layer_replication", "use_bdlora", "arrow_config", "kasa_config")
PASSED = ("target_parameters", "bias", "lora_bias", "trainable_token_indices", "ensure_weight_tying")
STARTS: dict[Any, Any] = {True: None, False: {"name": "nonzero", "storage": "none"}, "gaussian": "gaussian", "orthogonal": "orthogonal-pair"}
HEADS: dict[str | None, tuple[str, ...]] = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
TARGETS: dict[str, list[str] | str] = {  # what PEFT adapts where target_modules is None, by config.model_type
    "t5": ["q", "v"], "mt5": ["q", "v"], "gpt2": ["c_attn"], "gpt_bigcode": ["c_attn"], "blip-2": ["q", "v", "q_proj", "v_proj"],
    "deberta": ["in_proj"], "deberta-v2": ["query_proj", "value_proj"], "mpt": ["Wqkv"], "btlm": ["c_proj", "c_attn"], "codegen": ["qkv_proj"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"], "gemma4": r".*language_model\..*\.(q_proj|v_proj)", "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "rwkv": ["key", "value", "receptance", "output"], "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}
for _kinds, _targets in (
        (("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
         ["q_proj", "v_proj"]),
        (("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), ["query", "value"]),
        (("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"), ["query_key_value"])):
    TARGETS |= {k: list(_targets) for k in _kinds}


def check(config: Any) -> LoraConfig:
    """The configuration, if all of it can be carried out. LorakitError naming the field otherwise."""
    if not isinstance(config, LoraConfig):
        raise LorakitError(f"the configuration is a {type(config).__module__}.{type(config).__name__}; mend: make it with lorakit.compat.peft.LoraConfig")
    fresh = LoraConfig()
    for name in ABSENT:
        if (value := getattr(config, name)) != getattr(fresh, name) and value is not None:
            raise LorakitError(f"LoraConfig: `{name}` is not there yet in lorakit.compat.peft; mend: leave it at {getattr(fresh, name)!r}")
    start = config.init_lora_weights
    known = start in STARTS or start in MADE or any((start == n or start in i.aliases) and not i.collect for n, i in INITS.items())
    if not known and not re.fullmatch(r"pissa_niter_\d+", str(start)):
        raise LorakitError(f"LoraConfig: init_lora_weights `{start}` is not there yet in lorakit.compat.peft{near(str(start), [*map(str, STARTS), *INITS])}")
    return config


def _names(value: Sequence[str] | str | None) -> list[str] | str | None:
    if isinstance(value, str):
        return value if value == "all-linear" else f"(?:{value})"  # a string is one regular expression in PEFT, whatever it looks like
    return value if value is None else sorted(value)


def _start(config: LoraConfig) -> Any:
    if config.init_lora_weights in MADE:
        name, _ = MADE[config.init_lora_weights]
        return made_of(name, getattr(config, name)).start()
    return STARTS.get(config.init_lora_weights, config.init_lora_weights)


def options_of(config: LoraConfig, model: nn.Module) -> dict[str, Any]:
    """compose's options. Sets `target_modules` and `modules_to_save` on the configuration where PEFT does: by model type and by task."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if config.target_modules is None and kind in TARGETS:
        config.target_modules = TARGETS[kind] if isinstance(TARGETS[kind], str) else set(TARGETS[kind])
    if config.target_modules is None and not config.target_parameters:
        raise LorakitError(f"PEFT has no default target_modules for {f'model_type `{kind}`' if kind else type(model).__name__}; "
                           "mend: target_modules='all-linear', or names")
    if heads := HEADS.get(config.task_type):
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))
    there = {part for n, _ in model.named_modules() for part in n.split(".")}
    saved = [n for n in config.modules_to_save or [] if n in there or n not in (heads or ())]
    pattern = config.layers_pattern
    fresh = LoraConfig()
    return {
        "r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout, "use_rslora": config.use_rslora, "use_dora": config.use_dora,
        "target_modules": [] if config.target_modules is None else _names(config.target_modules), "exclude_modules": _names(config.exclude_modules) or None,
        "layers_to_transform": config.layers_to_transform, "layers_pattern": pattern if isinstance(pattern, str) or not pattern else f"(?:{'|'.join(pattern)})",
        "rank_pattern": config.rank_pattern or {}, "alpha_pattern": config.alpha_pattern or {}, "modules_to_save": saved or None,
        "init": _start(config),
    } | {k: getattr(config, k) for k in PASSED if getattr(config, k) != getattr(fresh, k)}


def plan_of(config: LoraConfig, model: nn.Module, paths: Sequence[str] = ()) -> tuple[Spec, dict[str, Method]]:
    """The Spec and the plan (path -> method) of a configuration on this model; `paths` stand in for its target_modules.

    The start depends on torch's global generator, as in PEFT.
    """
    if type(config) in AROUND.values():
        spec = config.spec(model, int(torch.randint(2**31 - 1, (1,))))
        return spec, spec.plan(model)
    options = options_of(check(config), model) | {"seed": int(torch.randint(2**31 - 1, (1,)))}
    spec = compose("lora", heads=False, **options | ({"target_modules": list(paths)} if paths else {}))  # PEFT trains no head unasked
    return spec, spec.plan(model)
