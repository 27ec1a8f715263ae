"""Delta-LoRA: the base weight moves with the product of the factors. Zi et al., 2023, arXiv 2309.02411.

    after step t, if t > K:   W := W + λ s (B_{t+1} A_{t+1} - B_t A_t)          steps count from 0

W has no gradient and no optimiser state. The sum telescopes: W_T = W + λ s (B_T A_T - B_{K+1} A_{K+1}), so with the adapter itself
the result is a LoRA of rank 2 r, [(1 + λ) B_T, -λ B_{K+1}] [A_T; A_{K+1}], and is saved as one. W is computed by that sum, so that a
base in bfloat16 loses nothing of the small steps. No dropout on the adapter, as in the paper: the base would learn what was dropped.
"""

from __future__ import annotations

from lorakit.errors import LorakitError
from lorakit.hooks import rounds
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.factors import pairs


@hook("delta_lora", "Delta-LoRA", "2309.02411", "W := W + λ s (B' A' - B A) after every step")
class DeltaLoRA(Hook):
    ratio: float = 2.0  # λ: how much of the factors' step the base makes; 0: plain LoRA
    after: int = 500  # K: the base begins to move in step K + 1, counted from 0

    place = 60
    model = None

    def __post_init__(self):
        if self.ratio < 0 or self.after < 0:
            raise LorakitError(f"delta_lora: ratio and after must be at least 0, not {self.ratio}, {self.after}")

    def setup(self, model):
        self.model, self.begun = model, {}
        for p in pairs(model, "delta_lora", both=True):
            rounds.lora_like(p.method, "delta_lora", p.path)
            if p.slot.dropout.get(p.adapter):
                raise LorakitError(f"delta_lora: {p.path} has dropout on the adapter, which the base would not forget; mend: lora_dropout: 0")

    def before_step(self, model, optimizer, step):
        for p in pairs(model, "delta_lora") if self.ratio and step > self.after else ():
            if rounds.begun(p) is None:
                self.begun[p.path, p.adapter] = p.B.detach() * -self.ratio, p.A.detach().clone()

    def after_step(self, model, optimizer, step):
        for p in pairs(model, "delta_lora") if self.ratio and step > self.after else ():
            before = rounds.begun(p)
            B0, A0 = self.begun.pop((p.path, p.adapter)) if before is None else (before.B0, before.A0)
            rounds.take(p, B0, A0, self.ratio)

    def state_dict(self):
        return {"rounds": rounds.state_of(self.model)}

    def load_state_dict(self, state):
        rounds.load_state(self.model, state["rounds"], "delta_lora")
