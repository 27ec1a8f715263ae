"""PEFT's settings of the starts that look at data or at a quantised base. `start` says each as an init of lorakit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lorakit.errors import LorakitError, near


def _word(where: str, value: str, known: Mapping[str, str] | tuple[str, ...]) -> None:
    if value not in known:
        raise LorakitError(f"{where}: unknown `{value}`{near(str(value), known)}")


@dataclass
class EvaConfig:
    """Ranks and directions from the inputs of layers (Paischer et al., 2024, arXiv 2410.07170), by `initialize_lora_eva_weights`.

    tau: accepted; one pass over the data is made here and none is stopped early. label_mask_value: -100, what labels ignore everywhere else.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self):
        if self.rho < 1:
            raise LorakitError(f"EvaConfig: rho must be at least 1, not {self.rho}")
        if not 0 <= self.tau <= 1:
            raise LorakitError(f"EvaConfig: tau must be from 0 to 1, not {self.tau}")
        if self.label_mask_value != -100:
            raise LorakitError("EvaConfig: `label_mask_value` is -100 here; mend: labels of -100 where a token does not count")

    def start(self) -> None:
        """None: the method's own start until `initialize_lora_eva_weights`, as in PEFT."""

    def options(self) -> dict[str, Any]:
        return {"rho": float(self.rho), "whiten": self.whiten, "label_mask": self.use_label_mask, "keep_strength": self.adjust_scaling_factors}


@dataclass
class CordaConfig:
    """A decomposition oriented by the inputs of layers (Yang et al., 2024, arXiv 2406.05223), by `preprocess_corda`.

    covariance_file: read where it exists, else written, in PEFT's layout. verbose, use_float16_for_covariance and prune_temporary_fields are
    accepted: sums are float32 and nothing temporary stays.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self):
        _word("CordaConfig: corda_method", self.corda_method, ("ipm", "kpm"))

    def start(self) -> dict[str, Any]:
        if self.cache_file is not None:
            raise LorakitError("CordaConfig: `cache_file` is not there in lorakit.compat.peft; mend: covariance_file, which serves every rank")
        return {"name": "corda", "mode": self.corda_method}


SCALES = {"stable": "stable", "gd_scale": "gd", "unit": "unit"}


@dataclass
class LoraGAConfig:
    """A start whose first step is the best low-rank one (Wang et al., 2024, arXiv 2407.05000), by `preprocess_loraga`.

    The form is the authors': A and B are singular vectors of the gradient, both scaled. PEFT multiplies B by the singular values as well and, in
    `stable`, scales B alone: the same spans, other lengths.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    def __post_init__(self):
        _word("LoraGAConfig: direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        _word("LoraGAConfig: scale", self.scale, (*SCALES, "weight_svd"))

    def start(self) -> dict[str, Any]:
        if self.scale not in SCALES:
            raise LorakitError(f"LoraGAConfig: scale `{self.scale}` is not there in lorakit.compat.peft; mend: stable, gd_scale or unit")
        return {"name": "lora-ga", "direction": self.direction, "scale": SCALES[self.scale], "gamma": float(self.stable_gamma)}


@dataclass
class LoftQConfig:
    """The base quantised and the factors made together (Li et al., 2023, arXiv 2310.08659).

    Targets that are not quantised yet become packed layers (nf2, nf4, or int8 for 8 bits), on any device. PEFT keeps a dense base with rounded
    numbers, leaves alpha / r out of the start, and needs CUDA. The base stays quantised when the adapter is taken off.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self):
        if self.loftq_bits not in (2, 4, 8):
            raise LorakitError(f"LoftQConfig: loftq_bits must be 2, 4 or 8, not {self.loftq_bits!r}")
        if isinstance(self.loftq_iter, bool) or not isinstance(self.loftq_iter, int) or self.loftq_iter < 1:
            raise LorakitError(f"LoftQConfig: loftq_iter must be a whole number of at least 1, not {self.loftq_iter!r}")

    def scheme(self) -> str:
        return f"nf{self.loftq_bits}" if self.loftq_bits < 8 else "int8"

    def start(self) -> dict[str, Any]:
        return {"name": "loftq", "steps": self.loftq_iter}


MADE = {  # init_lora_weights -> (field of LoraConfig, its class)
    "eva": ("eva_config", EvaConfig), "corda": ("corda_config", CordaConfig), "lora_ga": ("lora_ga_config", LoraGAConfig),
    "loftq": ("loftq_config", LoftQConfig),
}


def made_of(name: str, value: Any) -> Any:
    """A field's value as its class: None, an object of it, or a dictionary (as files hold it)."""
    cls = next(c for f, c in MADE.values() if f == name)
    if not value or isinstance(value, cls):
        return value or None
    if not isinstance(value, Mapping):
        raise LorakitError(f"LoraConfig: `{name}` is a {cls.__name__} or a dictionary, not {type(value).__name__}")
    known = [f.name for f in fields(cls)]
    for k in value:
        if k not in known:
            raise LorakitError(f"{cls.__name__} has no field `{k}`{near(k, known)}")
    return cls(**value)
