"""LoRA: low-rank adaptation. Hu et al., 2021, arXiv 2106.09685.

    W' = W + s B A,   s = alpha / r        (rsLoRA, arXiv 2312.03732: s = alpha / sqrt(r))

A (r, i) and B (o, r) train. A starts uniform in ±1/sqrt(i), B at zero, so W' = W at step 0. On an embedding the
roles swap, as in loralib and PEFT: A, which is looked up, starts at zero and B normal.
"""

from __future__ import annotations

import dataclasses

import torch

from lorakit.errors import LorakitError
from lorakit.method import SCALINGS, Leaf, LowRank, check_rank, choice, kaiming, method, normal, refuse, zeros

# what PEFT 0.21 writes for a LoRA that uses none of these; what would change the numbers and is not here must have this value
PEFT = {
    "alora_invocation_tokens": None, "arrow_config": None, "bias": "none", "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
    "fan_in_fan_out": False, "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "loftq_config": {}, "lora_ga_config": None,
    "megatron_config": None, "megatron_core": "megatron.core", "monteclora_config": None, "qalora_group_size": 16, "target_parameters": None,
    "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False, "velora_config": None,
}
MATHS = ("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config", "use_bdlora", "use_qalora",
         "velora_config")
MOVE_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")  # PEFT's starts after which the frozen base is another one


@method("lora", title="LoRA", paper="2106.09685", formula="W + s B A", laws=("rank<=r", "identity"))
class LoRA(LowRank):
    varies = {"rank_pattern": ("r", "r"), "alpha_pattern": ("lora_alpha", "alpha")}
    peft_layers = ("linear", "transposed", "embedding", "conv1d", "conv2d", "conv3d", "parameter")
    peft_dropout = "lora_dropout"

    r: int = 8  # rank
    alpha: float = 16.0  # strength: the update is scaled by s = alpha / r
    scaling: str = choice("standard", SCALINGS)  # standard: alpha/r; rslora: alpha/sqrt(r)
    lora_bias: bool = False  # B has a bias of its own: y + s (B A x + d)

    A = Leaf("r i", kaiming, key="lora_A.weight", lookup=("lora_embedding_A", zeros))
    B = Leaf("o r", zeros, key="lora_B.weight", lookup=("lora_embedding_B", normal(1.0)))

    @property
    def leaves(self):
        return self.own | ({"d": Leaf("o", zeros, key="lora_B.bias")} if self.lora_bias else {})

    @classmethod
    def examples(cls):
        return [cls(4, 9.6, "rslora"), cls(2, 5.0, "rslora", lora_bias=True)]

    def unfit(self, site):
        return "lora_bias needs a layer that can have a bias" if self.lora_bias and site.bias_name is None else None

    def bias(self, p, b):
        if "d" not in p:
            return b
        d = p["d"] * self.s
        return d if b is None else b + d

    def __post_init__(self):
        check_rank("lora", self.r)

    @property
    def s(self) -> float:
        return SCALINGS[self.scaling](self.alpha, self.r)

    def factors(self, p):
        return p["B"] * self.s, p["A"]

    def live(self, p):
        return p["B"], self.s, p["A"]

    def transpose(self, p):
        return None if self.lora_bias else {"A": p["B"].mT, "B": p["A"].mT}

    def from_file(self, shapes):
        return dataclasses.replace(self, r=shapes["A"][0])

    def to_peft(self):
        alpha = int(self.alpha) if float(self.alpha).is_integer() else self.alpha
        return PEFT | {"peft_type": "LORA", "r": self.r, "lora_alpha": alpha, "use_rslora": self.scaling == "rslora", "lora_bias": self.lora_bias}

    @classmethod
    def from_peft(cls, config):
        if config.get("peft_type") != "LORA":
            return None
        refuse(config, **{k: PEFT[k] for k in MATHS})
        if str(config.get("init_lora_weights")).split("_niter_")[0] in MOVE_THE_BASE:
            raise LorakitError(f"this adapter began with PEFT's init `{config['init_lora_weights']}`, which changed the base's weights, so it is wrong on the "
                               "untouched base; mend: save it from PEFT with path_initial_model_for_weight_conversion, or, if the base you load is the "
                               "changed one that was saved with it, set init_lora_weights to true in adapter_config.json")
        return cls(config.get("r", 8), config.get("lora_alpha", 8), "rslora" if config.get("use_rslora") else "standard", bool(config.get("lora_bias")))


def folded(B: torch.Tensor, gate: torch.Tensor, A: torch.Tensor) -> tuple[LoRA, dict[str, torch.Tensor]] | None:
    """B diag(gate) A as a LoRA of the components whose gate is open; None where all are, or none is. Of a stack: open in any of its matrices."""
    live = (gate != 0).flatten(0, -2).any(0) if gate.dim() > 1 else gate != 0
    r = int(live.sum())
    return (LoRA(r, float(r)), {"A": A[..., live, :], "B": (B * gate[..., None, :])[..., live]}) if 0 < r < len(live) else None
