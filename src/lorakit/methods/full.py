"""A trained copy of a whole layer: full fine-tuning of chosen layers, and what PEFT calls `modules_to_save`.

    W' = V,   b' = c

V (o, i) and, where the layer has a bias, c (o) train; they start at W and b, so the output is the base's at step 0.
"""

from __future__ import annotations

import dataclasses

from lorakit.method import Leaf, Method, base_bias, base_weight, method


@method("full", title="Full copy", formula="V", laws=("identity",), aliases=("full-fine-tuning", "modules_to_save"))
class Full(Method):
    replaces = True

    with_bias: bool = True  # the bias beside the weight, too
    trains: bool = True  # a buffer's copy is the adapter's own, but does not train

    V = Leaf("o i", base_weight, key="modules_to_save.weight")
    c = Leaf("o", base_bias, key="modules_to_save.bias", biased=True)

    @property
    def leaves(self):
        return self.own if self.with_bias else {"V": dataclasses.replace(self.own["V"], trains=self.trains)}

    @classmethod
    def examples(cls):
        return [cls(), cls(with_bias=False)]

    def to_peft(self):
        return {"peft_type": "LN_TUNING"} if self.trains else None

    @classmethod
    def from_peft(cls, config):
        return cls() if config.get("peft_type") == "LN_TUNING" else None

    def transpose(self, p):
        return {"V": p["V"].mT}

    def weight(self, p, W):
        return p["V"].to(W.dtype)

    def act(self, p, x, f, site, drop):
        return site.op(x, p["V"].to(x.dtype if x.is_floating_point() else site.dtype))

    def bias(self, p, b):
        return p.get("c", b)
