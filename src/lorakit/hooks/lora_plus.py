"""LoRA+: B learns faster than A. Hayou et al., 2024, arXiv 2402.12354.

    ratio:  lr_A = lr,          lr_B = ratio · lr
    sqrt:   lr_A = lr / √r,     lr_B = lr · √r          (the form of some surveys; r is each target's own)

Only the factors called B (of LoRA and of everything built like it) get the higher rate; vectors and biases do not.
Lower the base rate by about two when you use it.
"""

from __future__ import annotations

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.host import slots
from lorakit.method import choice


@hook("lora_plus", "LoRA+", "2402.12354", "lr_B = ratio · lr_A")
class LoRAPlus(Hook):
    ratio: float = 16.0  # the paper's practical value, 2^4; useful between 4 and 32
    form: str = choice("ratio", ("ratio", "sqrt"))  # sqrt: ratio is not used, the rates follow the rank

    def __post_init__(self):
        if self.ratio < 1:
            raise LorakitError(f"lora_plus: ratio must be at least 1, not {self.ratio}")

    def param_groups(self, model, groups):
        times: dict[int, float] = {}
        for s in slots(model).values():
            for p in (s.parameters(a) for a in s.methods):
                if "B" in p:
                    r = p["B"].shape[-1]
                    times[id(p["B"])] = r**0.5 if self.form == "sqrt" else self.ratio
                    if "A" in p and self.form == "sqrt":
                        times[id(p["A"])] = r**-0.5
        out = []
        for g in groups:
            for t in sorted({times.get(id(p), 1.0) for p in g["params"]}):
                out.append({**g, "params": [p for p in g["params"] if times.get(id(p), 1.0) == t], "lr": g["lr"] * t})
        return out
