"""Diff pruning. Guo, Rush, Kim, 2020, arXiv 2012.07463.

    W' = W + g z ∘ w,   z = clamp(sbar, 0, 1),   sbar = sigmoid(log u - log(1 - u) + a) (upper - lower) + lower,   u ~ U(1e-4, 1 - 1e-4)

w (o, i), the logits a of z (o, i) and the logit of g (1; g is one such z for the whole weight) train; w starts at zero, so W' = W at step 0, the
logits at `logit`. In training u is drawn anew at every call from torch's global generator; else, and wherever one weight has to stand for the layer,
it is left out (u = 1/2). The loss gets a small multiple of `penalty`, the expected number of entries that are not zero. To fix a mask afterwards, set
its logits to ±30 and freeze them: z is then exactly 1 or 0, drawn or not. A parameter that is only read is never sampled. This trains two copies of W.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.method import Additive, Leaf, Params, constant, method, zeros

EDGE = 1e-4  # how near to 0 and 1 u may come


@method("diff-pruning", title="Diff pruning", paper="2012.07463", formula="W + g z ∘ w", laws=("identity",))
class DiffPruning(Additive):
    logit: float = 5.0  # where the logits start: 5 keeps nearly everything
    lower: float = -1.5  # z is stretched to lower … upper before it is cut to 0 … 1
    upper: float = 1.5
    structured: bool = True  # one more gate for the whole weight

    w = Leaf("o i", zeros, key="diff_weight")
    a = Leaf("o i", constant("logit"), key="diff_logits")
    g = Leaf("one", constant("logit"), key="diff_group", only="one")

    def __post_init__(self):
        if not self.lower < 0 < 1 < self.upper:
            raise LorakitError(f"diff-pruning: lower must be below 0 and upper above 1, not {self.lower!r} and {self.upper!r}")

    @classmethod
    def examples(cls):
        return [cls(0.6, -0.1, 1.1), cls(0.2, -0.9, 1.3, False)]

    def dims(self, o, i):
        return super().dims(o, i) | {"one": int(self.structured)}

    def gate(self, a: Tensor, sampled: bool) -> Tensor:
        if sampled:
            u = torch.rand_like(a) * (1 - 2 * EDGE) + EDGE
            a = a + u.log() - (1 - u).log()
        return (a.sigmoid() * (self.upper - self.lower) + self.lower).clamp(0, 1)

    def change(self, p: Params, sampled: bool) -> Tensor:
        d = self.gate(p["a"], sampled) * p["w"]
        return d * self.gate(p["g"], sampled) if self.structured else d

    def delta(self, p, W):
        return self.change(p, False)

    def update(self, p, x, f, site, drop):
        return site.op(drop(x), self.change(p, site.module.training).to(x.dtype if x.is_floating_point() else site.dtype))

    def penalty(self, p: Params) -> Tensor:
        """How many entries of the gates are expected not to be zero."""
        return sum((p[k] - math.log(-self.lower / self.upper)).sigmoid().sum() for k in ("a", "g") if k in p)
