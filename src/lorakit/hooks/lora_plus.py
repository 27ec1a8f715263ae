"""LoRA+: B learns faster than A. Hayou et al., 2024, arXiv 2402.12354.

    lr_B = ratio · lr_A

Only the factors called B (of LoRA and of everything built like it) get the higher rate; vectors and biases do not.
Lower the base rate by about two when you use it.
"""

from __future__ import annotations

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.host import slots


@hook("lora_plus", "LoRA+", "2402.12354", "lr_B = ratio · lr_A")
class LoRAPlus(Hook):
    ratio: float = 16.0  # the paper's practical value, 2^4; useful between 4 and 32

    def __post_init__(self):
        if self.ratio < 1:
            raise LorakitError(f"lora_plus: ratio must be at least 1, not {self.ratio}")

    def param_groups(self, model, groups):
        fast = {id(p["B"]) for s in slots(model).values() for a in s.methods if "B" in (p := s.parameters(a))}
        out = []
        for g in groups:
            for some, ratio in (([p for p in g["params"] if id(p) not in fast], 1.0), ([p for p in g["params"] if id(p) in fast], self.ratio)):
                if some:
                    out.append({**g, "params": some, "lr": g["lr"] * ratio})
        return out
