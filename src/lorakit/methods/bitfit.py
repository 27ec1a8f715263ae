"""BitFit: only the biases train. Ben Zaken et al., 2021, arXiv 2106.10199.

    W' = W,   b' = c

c (o) starts at the layer's bias. It belongs to the adapter: with the adapter off the layer has b again.
"""

from __future__ import annotations

from lorakit.method import Leaf, Method, base_bias, method


@method("bitfit", title="BitFit", paper="2106.10199", formula="W; b -> c", laws=("identity",))
class BitFit(Method):
    c = Leaf("o", base_bias, key="modules_to_save.bias", biased=True)

    def unfit(self, site):
        return "bitfit trains a bias, and this layer has none" if site.bias is None else None

    def weight(self, p, W):
        return W

    def act(self, p, x, f, site, drop):
        return f(x)

    def bias(self, p, b):
        return p["c"]

    def to_peft(self):
        return {"bias": "all"}
