"""A trained bias beside any method: PEFT's `bias="lora_only"`, and for adapted layers its `bias="all"`.

    W' = inner(W),   b' = inner's bias over c

c (o) starts at the layer's bias b and belongs to the adapter: with the adapter off the layer has b again, where PEFT, which
trains b itself, keeps the trained one. A layer without a bias is left to the inner method.
"""

from __future__ import annotations

from lorakit.errors import LorakitError
from lorakit.method import Leaf, Method, Wrapper, base_bias, method, method_from_peft


@method("trained-bias", title="Trained bias", formula="inner(W); b -> c", laws=("identity",))
class TrainedBias(Wrapper):
    inner: Method

    c = Leaf("o", base_bias, key="base_layer.bias", biased=True)

    def __post_init__(self):
        if "c" in self.inner.leaves:
            raise LorakitError(f"a trained bias around {self.inner.name} means nothing: it has one already")

    @property
    def adds(self):
        return self.inner.adds

    def weight(self, p, W):
        return self.inner.weight(p, W)

    def weight_at(self, p, W, site):
        return self.inner.weight_at(p, W, site)

    def unrounded(self, p, W):
        return self.inner.unrounded(p, W)

    def act(self, p, x, f, site, drop):
        return self.inner.act(p, x, f, site, drop)

    def update(self, p, x, f, site, drop):
        return self.inner.update(p, x, f, site, drop)

    def two(self, p):
        return self.inner.two(p)

    def bias(self, p, b):
        return self.inner.bias(p, p.get("c", b))

    def to_peft(self):
        inner = self.inner.to_peft()
        return inner | {"bias": "lora_only"} if inner and "bias" in inner else None

    @classmethod
    def from_peft(cls, config):
        if config.get("bias", "none") == "none":
            return None
        inner = method_from_peft(config | {"bias": "none"})
        if "bias" not in (inner.to_peft() or {}):
            raise LorakitError(f"the adapter uses `bias: {config['bias']}` beside {inner.core.name}, which this version of lorakit does not carry out")
        return cls(inner)
