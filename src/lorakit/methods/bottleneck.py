"""Serial bottleneck adapters: Houlsby et al., 2019, arXiv 1902.00751; Pfeiffer et al., 2020, arXiv 2005.00247.

    y' = y + scale (U act(D y + d) + u),   y the layer's output with its bias

D (width, o), U (o, width) and the biases d, u train. Put on the outputs of a block's attention and feed-forward parts, before the
residual is added (`targets: block-outputs`), this is Houlsby's adapter, with its trained layer norms; on the feed-forward part alone it
is Pfeiffer's. Start "zero": U and u at zero, so the output is the base's; "normal": as in the paper, weights with deviation 0.001, which
is only nearly so. Not linear, so it does not merge.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lorakit.method import Leaf, Serial, check_rank, choice, method, normal, zeros

ACTS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


def up(shape, method, origin, gen):
    return (normal(1e-3) if method.start_at == "normal" else zeros)(shape, method, origin, gen)


def down(shape, method, origin, gen):
    return normal(1e-3 if method.start_at == "normal" else shape[-1] ** -0.5)(shape, method, origin, gen)


@method("bottleneck", title="Bottleneck adapter", paper="1902.00751", formula="y + scale (U act(D y + d) + u)", laws=("identity",))
class Bottleneck(Serial):
    width: int = 64  # of the bottleneck
    scale: float = 1.0
    act_fn: str = choice("gelu", ACTS)  # the non-linearity
    start_at: str = choice("zero", ("zero", "normal"))  # zero: U = 0, exactly the base; normal: the paper's small noise

    D = Leaf("width o", down, key="adapter_down.weight")
    d = Leaf("width", zeros, key="adapter_down.bias")
    U = Leaf("o width", up, key="adapter_up.weight")
    u = Leaf("o", zeros, key="adapter_up.bias")

    def __post_init__(self):
        check_rank("bottleneck (width)", self.width)

    @classmethod
    def examples(cls):
        return [cls(5, 0.7, "tanh"), cls(3, 1.3, "silu", "normal")]

    @property
    def laws(self):
        return self.card.laws if self.start_at == "zero" else ()

    def after(self, p, y, site, drop):
        p = {k: t.to(y.dtype) for k, t in p.items()}
        h = ACTS[self.act_fn](F.linear(drop(y.movedim(site.channel, -1)), p["D"], p["d"]))
        return F.linear(h, p["U"], p["u"]).movedim(-1, site.channel) * self.scale

    def size(self, p):
        return self.scale * (p["U"].norm() * p["D"].norm() + p["u"].norm())
