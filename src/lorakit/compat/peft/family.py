"""PEFT's configurations of the methods beside LoRA: the same fields, the same defaults, each turned into a Spec by the method's own `from_peft`."""

from __future__ import annotations

import dataclasses
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorakit.compat.peft.config import HEADS, TARGETS, LoraConfig, PeftConfig, PeftType, _names, check, options_of, register
from lorakit.errors import LorakitError
from lorakit.hooks.adalora import AdaLoRA as Allocator
from lorakit.method import method_from_peft
from lorakit.recipes import compose
from lorakit.spec import Spec

Names = list[str] | str | None
ABSENT = {"rank_dropout": 0.0, "module_dropout": 0.0, "boft_dropout": 0.0, "rank_dropout_scale": False, "save_only_topk_weights": False, "bias": "none",
          "init_ia3_weights": True, "coft": False}
_OTHER: dict[str, dict[str, Names]] = {  # what PEFT adapts by default where that is not what it adapts for LoRA
    "FOURIERFT": {"gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}, "VERA": {"phi": ["q_proj", "v_proj"]},
    "IA3": {"t5": ["k", "v", "wo"], "gpt2": ["c_attn", "mlp.c_proj"], "opt": ["q_proj", "k_proj", "fc2"], "bart": ["q_proj", "v_proj", "fc2"],
            "bloom": ["query_key_value", "mlp.dense_4h_to_h"], "roberta": ["key", "value", "output.dense"], "bert": ["key", "value", "output.dense"],
            "gptj": ["q_proj", "v_proj", "fc_out"], "gpt_neox": ["query_key_value", "dense_4h_to_h"], "gpt_neo": ["q_proj", "v_proj", "c_proj"],
            "gpt_bigcode": ["c_attn", "mlp.c_proj"], "mixtral": ["k_proj", "v_proj", "w2"], "phi": ["q_proj", "v_proj", "fc2"],
            "deberta-v2": ["key_proj", "value_proj", "output.dense"], "deberta": ["in_proj", "output.dense"], "falcon": ["query_key_value", "dense_4h_to_h"]}
    | {k: ["k_proj", "v_proj", "down_proj"] for k in ("llama", "mistral")}
    | {k: ["q_proj", "v_proj", "down_proj"] for k in ("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3")},
    "ADALORA": {"t5": ["q", "k", "v", "o", "wi", "wo"], "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"], "gpt2": ["c_attn"], "bloom": ["query_key_value"],
                "roberta": ["query", "key", "value", "dense"]}
    | {k: ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"] for k in ("bart", "opt")},
    "LN_TUNING": {"t5": ["layer_norm", "final_layer_norm"], "mt5": ["layer_norm", "final_layer_norm"], "gpt2": ["ln_1", "ln_2", "ln_f"],
                  "bart": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"], "gptj": ["ln_1", "ln_f"],
                  "blip-2": ["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"], "phi": ["input_layernorm", "final_layernorm"]}
    | {k: ["input_layernorm", "post_attention_layernorm", "ln_f"] for k in ("bloom", "falcon")}
    | {k: ["input_layernorm", "post_attention_layernorm", "norm"] for k in ("llama", "mistral", "gemma")}
    | {k: ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"] for k in ("gemma2", "gemma3_text")}
    | {k: ["post_attention_layernorm"] for k in ("qwen2", "qwen3")},
}


def _defaults(config: Any, model: nn.Module) -> list[str] | str:
    """Sets the target_modules of PEFT for this model, and says them."""
    kind, own = getattr(getattr(model, "config", None), "model_type", None), _OTHER.get(config.peft_type.value, {})
    words = own.get(kind, None if config.peft_type == PeftType.LN_TUNING else TARGETS.get(kind))
    if words is None:
        raise LorakitError(f"PEFT has no default target_modules for model_type `{kind}`; mend: target_modules='all-linear', or names")
    config.target_modules = words if isinstance(words, str) else set(words)
    return words


@dataclass
class Family(PeftConfig):
    """What they have in common."""

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = type(self).kind
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            if isinstance(getattr(self, name, None), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        if getattr(self, "layers_pattern", None) and self.layers_to_transform is None:
            raise LorakitError("layers_pattern has no meaning without layers_to_transform")

    def spec(self, model: nn.Module, seed: int) -> Spec:
        """The composition; sets `target_modules` and `modules_to_save` where PEFT does."""
        name = type(self).__name__
        for k, only in ABSENT.items():
            if getattr(self, k, only) != only:
                raise LorakitError(f"{name}: `{k}` is not there yet in lorakit.compat.peft; mend: leave it at {only!r}")
        if getattr(self, "init_weights", True) is False and self.peft_type not in ("FOURIERFT",):
            raise LorakitError(f"{name}: `init_weights` is not there yet in lorakit.compat.peft; mend: leave it at True")
        if self.target_modules is None:
            words = _defaults(self, model)
            if self.peft_type == "IA3" and self.feedforward_modules is None:
                self.feedforward_modules = {words[-1]}
        if heads := HEADS.get(self.task_type):
            self.modules_to_save = list(dict.fromkeys([*(self.modules_to_save or []), *heads]))
        there = {part for n, _ in model.named_modules() for part in n.split(".")}
        saved = [n for n in self.modules_to_save or [] if n in there or n not in (heads or ())]
        method = method_from_peft(self.to_dict())
        pattern = getattr(self, "layers_pattern", None)
        options: dict[str, Any] = {
            "target_modules": _names(self.target_modules), "exclude_modules": _names(getattr(self, "exclude_modules", None)) or None,
            "layers_to_transform": getattr(self, "layers_to_transform", None), "modules_to_save": saved or None,
            "layers_pattern": pattern if isinstance(pattern, str) or not pattern else f"(?:{'|'.join(pattern)})", "seed": seed,
            "dropout": getattr(self, method.core.peft_dropout, 0.0) if method.core.peft_dropout else 0.0,
        }
        patterns = {ours: dict(v) for k, (_, ours) in method.core.varies.items() if isinstance(v := getattr(self, k, None), dict) and v}
        if forward := getattr(self, "feedforward_modules", None):
            patterns["side"] = {f"(?:{forward})": "in"} if isinstance(forward, str) else dict.fromkeys(sorted(forward), "in")
        return compose(method, heads=False, patterns=patterns, **options)


def _config(kind: str, names: str, **fields: Any) -> type[Family]:
    """A configuration class: its own fields, after those that it shares with others (of `names`, in PEFT's spelling)."""
    shared = dict.fromkeys(names.split())
    made = []
    for k, v in (shared | fields).items():
        made.append((k, Any, field(default_factory=lambda v=v: dict(v)) if isinstance(v, dict) else field(default=v)))
    title = _TITLES[kind]
    cls = dataclasses.make_dataclass(title, made, bases=(Family,), namespace={"__doc__": f"PEFT's {title}: the same fields, the same defaults."})
    cls.__module__, cls.kind = __name__, PeftType(kind)
    return register(cls)


_TITLES = {"VERA": "VeraConfig", "LOHA": "LoHaConfig", "LOKR": "LoKrConfig", "IA3": "IA3Config", "OFT": "OFTConfig", "BOFT": "BOFTConfig", "HRA": "HRAConfig",
           "FOURIERFT": "FourierFTConfig", "VBLORA": "VBLoRAConfig", "MISS": "MissConfig", "POLY": "PolyConfig"}
_WHERE = "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save"
_LYCORIS: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "r": 8, "alpha": 8, "rank_dropout": 0.0, "module_dropout": 0.0,
                            "use_effective_conv2d": False, "init_weights": True}
VeraConfig = _config("VERA", "target_modules layers_to_transform layers_pattern modules_to_save", r=256, projection_prng_key=0, save_projection=True,
                     vera_dropout=0.0, d_initial=0.1, fan_in_fan_out=False, bias="none", init_weights=True)
LoHaConfig = _config("LOHA", _WHERE, **_LYCORIS)
LoKrConfig = _config("LOKR", _WHERE, **_LYCORIS, decompose_both=False, decompose_factor=-1, rank_dropout_scale=False)
IA3Config = _config("IA3", "target_modules exclude_modules feedforward_modules modules_to_save", fan_in_fan_out=False, init_ia3_weights=True)
OFTConfig = _config("OFT", _WHERE, r=0, oft_block_size=32, module_dropout=0.0, fan_in_fan_out=False, bias="none", init_weights=True, coft=False, eps=6e-5,
                    block_share=False, use_cayley_neumann=True, num_cayley_neumann_terms=5)
BOFTConfig = _config("BOFT", _WHERE, boft_block_size=4, boft_block_num=0, boft_n_butterfly_factor=1, boft_dropout=0.0, fan_in_fan_out=False, bias="none",
                     init_weights=True)
HRAConfig = _config("HRA", _WHERE, r=8, apply_GS=False, init_weights=True, bias="none")
FourierFTConfig = _config("FOURIERFT", _WHERE, n_frequency=1000, scaling=150.0, random_loc_seed=777, fan_in_fan_out=False, bias="none",
                          n_frequency_pattern={}, init_weights=False)
VBLoRAConfig = _config("VBLORA", _WHERE, r=4, num_vectors=256, vector_length=256, topk=2, save_only_topk_weights=False, vblora_dropout=0.0,
                       fan_in_fan_out=False, bias="none", init_vector_bank_bound=0.02, init_logits_std=0.1)
MissConfig = _config("MISS", _WHERE, r=64, miss_dropout=0.0, mini_r=1, init_weights=True, bias="none")
PolyConfig = _config("POLY", "target_modules exclude_modules modules_to_save", r=8, init_weights=True, poly_type="poly", n_tasks=1, n_skills=4, n_splits=1)
PolyConfig.asks = ("task_ids",)


@register
@dataclass
class LNTuningConfig(Family):
    """PEFT's LNTuningConfig: the same fields, the same defaults. The modules it names train whole."""

    target_modules: Names = None
    exclude_modules: Names = None
    modules_to_save: Names = None

    kind = PeftType.LN_TUNING

    def spec(self, model, seed):
        if self.target_modules is None:
            _defaults(self, model)
        pattern = self.target_modules if isinstance(self.target_modules, str) else None
        hit = [n for n, _ in model.named_modules() if n and (re.fullmatch(pattern, n) if pattern else _ends(n, self.target_modules))]
        out = self.exclude_modules or ()
        hit = [n for n in hit if not (re.fullmatch(out, n) if isinstance(out, str) else _ends(n, out))]
        if not hit:
            raise LorakitError(f"LNTuningConfig: target_modules {self.target_modules} name no module of this {type(model).__name__}")
        beside = [self.modules_to_save] if isinstance(self.modules_to_save, str) else self.modules_to_save or []
        there, heads = {part for n, _ in model.named_modules() for part in n.split(".")}, HEADS.get(self.task_type, ())
        self.modules_to_save = list(dict.fromkeys([*beside, *heads])) or None
        return compose(method_from_peft({"peft_type": self.kind.value}), targets=(), heads=False, seed=seed,
                       modules_to_save=[*hit, *(n for n in self.modules_to_save or () if n in there or n not in heads)])


def _ends(name: str, words: Any) -> bool:
    return any(f".{name}".endswith(f".{w}") for w in words)


@register
@dataclass
class AdaLoraConfig(LoraConfig):
    """PEFT's AdaLoraConfig: the same fields, the same defaults."""

    rank_pattern: dict | None = None
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    kind = PeftType.ADALORA

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = self.kind
        if self.r != 8:
            warnings.warn("AdaLoraConfig: `r` has no meaning; the rank at the beginning is `init_r`", stacklevel=3)
        if not self.total_step or self.total_step < 1:
            raise LorakitError("AdaLoraConfig: total_step is needed, the number of steps of training")
        if self.tinit >= self.total_step - self.tfinal:
            raise LorakitError(f"AdaLoraConfig: of {self.total_step} steps tinit {self.tinit} and tfinal {self.tfinal} leave none to prune in")

    def spec(self, model, seed):
        for k in ("use_dora", "use_rslora", "lora_bias", "target_parameters", "rank_pattern", "alpha_pattern"):
            if getattr(self, k):
                raise LorakitError(f"AdaLoraConfig: `{k}` is not there yet in lorakit.compat.peft; mend: leave it at its default")
        if self.init_lora_weights is not True or self.bias != "none":
            raise LorakitError("AdaLoraConfig: `init_lora_weights` and `bias` are not there yet in lorakit.compat.peft; mend: leave them at True and 'none'")
        if self.target_modules is None:
            _defaults(self, model)
        said = options_of(check(self), model)
        gone = ("r", "use_rslora", "use_dora", "lora_alpha", "rank_pattern", "alpha_pattern", "init")
        return compose(method_from_peft(self.to_dict()), heads=False, seed=seed, **{k: v for k, v in said.items() if k not in gone})

    def allocator(self):
        return Allocator(target_r=self.target_r, tinit=self.tinit, tfinal=self.tfinal, delta_t=self.deltaT, beta1=self.beta1, beta2=self.beta2,
                         orth_weight=self.orth_reg_weight, total_step=self.total_step)
