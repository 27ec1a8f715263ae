"""P-tuning: a prompt that a small network makes while it trains. Liu et al., 2021, arXiv 2103.10385.

    model([f(E); E(x)]) in place of model(E(x));   no weight changes, W' = W
    f = "mlp":   W3 relu(W2 relu(W1 E + b1) + b2) + b3
    f = "lstm":  W2 relu(W1 lstm(E) + b1) + b2, the LSTM in both directions

E (n, d) and f train. A finished adapter is saved as f(E), n learnt tokens, and f is gone; checkpoints and form="native" keep it, so that
training can go on. E starts at N(0, 1) and f as torch's layers do. This is not P-tuning v2, which is prefix tuning.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from lorakit.method import Leaf, choice, method, normal
from lorakit.methods.prompt import Prompt
from lorakit.prompts import Prompted, check, linear

KEY = "prompt_encoder."


def layer(number: int, out: str, width: str) -> dict[str, Leaf]:
    """Weight and bias of one linear layer, number `number` of the head in PEFT's encoder."""
    at = f"{KEY}mlp_head.{number}"
    n = number // 2 + 1
    return {f"W{n}": Leaf(f"{out} {width}", linear(width), key=f"{at}.weight"), f"b{n}": Leaf(out, linear(width), key=f"{at}.bias")}


@method("ptuning", title="P-tuning", paper="2103.10385", formula="model([f(E); E(x)])")
class PTuning(Prompted):
    num_virtual_tokens: int = 20  # n, learnt tokens
    encoder: str = choice("mlp", ("mlp", "lstm"))  # the network f
    hidden: int = 0  # its width; 0: that of the embeddings
    lstm_layers: int = 2  # of the LSTM
    encoder_dropout: float = 0.0  # between the LSTM's layers, in training
    width: int = 0  # d, that of the embeddings; found out
    copies: int = 1  # 2 in the file for an encoder and decoder, of which PEFT uses the first; found out

    def __post_init__(self):
        check(self, "num_virtual_tokens")

    @classmethod
    def examples(cls):
        return [cls(3, "lstm", 6, 1, 0.1, 8, 2), cls(4, hidden=5, width=8)]

    @property
    def leaves(self):
        out = {"E": Leaf("num_virtual_tokens width", normal(1.0), key=f"{KEY}embedding.weight")}
        if self.encoder == "mlp":
            return out | layer(0, "hidden", "width") | layer(2, "hidden", "hidden") | layer(4, "width", "hidden")
        for n in range(self.lstm_layers):
            for back in ("", "_reverse"):
                for k, axes in (("weight_ih", f"gates {'both' if n else 'width'}"), ("weight_hh", "gates hidden"), ("bias_ih", "gates"), ("bias_hh", "gates")):
                    name = f"{k}_l{n}{back}"
                    out[name] = Leaf(axes, linear("hidden"), key=f"{KEY}lstm_head.{name}")
        return out | layer(0, "both", "both") | layer(2, "width", "both")

    def dims(self, o, i):
        h = self.hidden or self.width
        return super().dims(o, i) | {"hidden": h, "both": 2 * h, "gates": 4 * h}

    def on(self, site):
        return dataclasses.replace(self, width=site.out, copies=2 if site.pairs else 1) if site.whole == self.around_a else self

    def encoded(self, p, train=False):  # (n, d)
        h, parts = p["E"], 3
        if self.encoder == "lstm":
            weights = [t for k, t in p.items() if k.startswith(("weight_", "bias_"))]
            begin = h.new_zeros(2 * self.lstm_layers, 1, self.dims(0, 0)["hidden"])
            h = torch.lstm(h[None], (begin, begin), weights, True, self.lstm_layers, self.encoder_dropout, train, True, True)[0][0]
            parts = 2
        for n in range(1, parts + 1):
            h = F.linear(h, p[f"W{n}"], p[f"b{n}"])
            h = h if n == parts else F.relu(h)
        return h

    def prompt(self, p, site):
        return self.encoded(p, site.module.training)

    def size(self, p):
        return self.encoded(p).norm()

    def for_files(self, p):
        return Prompt(self.num_virtual_tokens, copies=self.copies), {"P": self.encoded(p).repeat(self.copies, 1)}
