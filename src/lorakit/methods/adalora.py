"""AdaLoRA's parametrisation. Zhang et al., 2023, arXiv 2303.10512.

    W' = W + s P diag(λ) Q,   s = alpha / (r + 1e-5)        (alpha of zero or less: s = r / (r + 1e-5))

Q (r, i), P (o, r) and λ (r, 1) train; P and Q start normal with deviation 0.02, λ at zero, so W' = W at step 0. r is the rank at the beginning
and stays in the scale however many λ are pruned later. As in PEFT the keys have no `.weight`. `penalty` is the orthogonality term of one layer,
the mean of the un-squared norms as in both public codes (the paper prints squares); who adds it, and who prunes, is the training's business.
"""

from __future__ import annotations

import dataclasses

import torch

from lorakit.errors import LorakitError
from lorakit.method import Leaf, LowRank, Params, check_rank, method, normal, zeros


@method("adalora", title="AdaLoRA", paper="2303.10512", formula="W + s P diag(λ) Q", laws=("rank<=r", "identity"))
class AdaLoRA(LowRank):
    peft_dropout = "lora_dropout"

    r: int = 12  # rank at the beginning, of which training prunes a part
    alpha: float = 8.0  # strength: the update is scaled by alpha / r
    left: int = 0  # components that pruning has left of r; 0: all

    Q = Leaf("rank i", normal(0.02), key="lora_A")
    P = Leaf("o rank", normal(0.02), key="lora_B")
    E = Leaf("rank one", zeros, key="lora_E")

    def __post_init__(self):
        check_rank("adalora", self.r)
        if not 0 <= self.left <= self.r:
            raise LorakitError(f"adalora: left is from 0 (all) to r={self.r}, not {self.left}")

    @classmethod
    def examples(cls):
        return [cls(3, 4.8), cls(4, -1.0, 2)]

    def dims(self, o, i):
        return super().dims(o, i) | {"one": 1, "rank": self.left or self.r}

    @property
    def s(self) -> float:
        return (self.alpha if self.alpha > 0 else self.r) / (self.r + 1e-5)

    def factors(self, p):
        return p["P"] * self.s, p["E"].squeeze(-1), p["Q"]

    def live(self, p):
        return p["P"], self.s, p["E"].squeeze(-1), p["Q"]

    def for_files(self, p):
        live = (p["E"] != 0).flatten(0, -3).any(0).flatten() if p["E"].dim() > 2 else (p["E"] != 0).flatten()  # of a stack: in any of its matrices
        n = int(live.sum())  # where none is left, or training has not begun, all stay
        return (dataclasses.replace(self, left=n), {k: p[k][..., live] if k == "P" else p[k][..., live, :] for k in "QPE"}) if 0 < n < len(live) else (self, p)

    def penalty(self, p: Params) -> torch.Tensor:
        """How far P and Q are from orthonormal."""
        eye = torch.eye(self.left or self.r, dtype=p["P"].dtype, device=p["P"].device)
        return ((p["P"].mT @ p["P"] - eye).norm() + (p["Q"] @ p["Q"].mT - eye).norm()) / 2

    def to_peft(self):
        return {"peft_type": "ADALORA", "init_r": self.r, "target_r": self.r, "r": 8, "lora_alpha": self.alpha, "init_lora_weights": True, "tinit": 0,
                "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5, "total_step": 1, "rank_pattern": None, "fan_in_fan_out": False}

    @classmethod
    def from_peft(cls, config):
        return cls(config.get("init_r", 12), float(config.get("lora_alpha", 8))) if config.get("peft_type") == "ADALORA" else None

    def at_peft(self, config, shapes):
        return dataclasses.replace(self, left=shapes["E"][0] % self.r)

    def restored(self, config, tensors):  # of a target of which nothing is left: one component that does nothing
        axes = {f"{self.key(k)}": self.leaves[k].axes.split().index("rank") for k in "QPE"}
        found = {k: axes.get(k.rpartition(".")[2]) for k in tensors}
        return {k: t if (at := found[k]) is None or t.shape[at] else t.new_zeros([1 if n == at else d for n, d in enumerate(t.shape)])
                for k, t in tensors.items()}

    @classmethod
    def joined(cls, config, methods):
        left = {f"{p}.lora_E": [n < (m.left or m.r) for n in range(m.r)] for p, m in methods.items()}
        return config | {"rank_pattern": left} if any(m.left for m in methods.values()) else config
