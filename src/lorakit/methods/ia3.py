"""(IA)³: scaling what goes out of, or into, a layer. Liu et al., 2022, arXiv 2205.05638.

    side "out" (keys, values):             W' = diag(l) W,   b' = l · b      l (o)
    side "in" (second matrix of an MLP):   W' = W diag(l)                    l (i)

l trains and starts at one, so W' = W at step 0. The paper scales the MLP between its two matrices, which is the input of the second one: give that
one side "in" (PEFT's feedforward_modules). The other way, its bias would be scaled, too.
"""

from __future__ import annotations

import dataclasses

from lorakit.method import Leaf, Method, choice, method, ones


@method("ia3", title="(IA)³", paper="2205.05638", formula="diag(l) W, or W diag(l)", laws=("row_gain", "row_angles", "identity"), aliases=("(ia)3",))
class IA3(Method):
    varies = {"feedforward_modules": ("feedforward", "side")}
    peft_layers = ("linear", "transposed", "conv2d", "conv3d")

    side: str = choice("out", ("out", "in"))  # what is scaled: the layer's outputs, bias included, or its inputs

    l = Leaf("o one", ones, key="ia3_l")

    @property
    def leaves(self):
        return self.own if self.side == "out" else {"l": dataclasses.replace(self.own["l"], axes="one i")}

    @property
    def laws(self):
        return self.card.laws if self.side == "out" else ("identity",)

    @classmethod
    def examples(cls):
        return [cls("in"), cls("out")]

    def dims(self, o, i):
        return super().dims(o, i) | {"one": 1}

    def weight(self, p, W):
        return W * p["l"].to(W.dtype)

    def act(self, p, x, f, site, drop):
        l = p["l"].flatten()
        if self.side == "out":
            y = f(x)
            return site.scale(y, l.to(y.dtype), last=True)
        if site.slides:
            return super().act(p, x, f, site, drop)
        return f(x) * l[x, None].to(site.dtype) if site.lookup else f(x * l.to(x.dtype))

    def bias(self, p, b):
        return b * p["l"].squeeze(-1) if b is not None and self.side == "out" else b

    def from_file(self, shapes):
        rows, columns = shapes["l"]
        return self if rows == columns else dataclasses.replace(self, side="out" if columns == 1 else "in")

    def to_peft(self):
        return {"peft_type": "IA3", "fan_in_fan_out": False, "init_ia3_weights": True, "feedforward": self.side == "in"}

    @classmethod
    def from_peft(cls, config):
        return cls() if config.get("peft_type") == "IA3" else None

    def layout(self, leaf, site):
        return (1, site.out, *[1] * site.n) if site.slides and self.side == "out" else None

    def on_peft(self, site):
        return not (site.slides and self.side == "in")

    def at_peft(self, config, shapes):
        if len(shapes["l"]) == 2:
            return self.from_file(shapes)
        return self  # a convolution, whose inputs PEFT scales by channel and not by entry of the kernel
