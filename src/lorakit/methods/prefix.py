"""Prefix tuning: learnt keys and values in front of every layer's own. Li and Liang, 2021, arXiv 2101.00190.

    softmax(q [P_k; K]ᵀ / sqrt(dh)) [P_v; V] in every layer;   no weight changes, W' = W

P (n, 2 L kv) trains: n pairs for each of L layers, kv = key-value heads · head size. With `projection` it is W2 tanh(W1 E + b1) + b2,
E (n, kv), while training, and is saved as what comes out. It starts at N(0, 1); "zero" starts P at zero, which is not the base's function:
keys of zero still take their share of the attention. Positions of real tokens start at n; it lives in the cache, which gradient
checkpointing forbids. Of an encoder and decoder, the decoder's own attention gets it.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from lorakit.method import Leaf, choice, method, normal, zeros
from lorakit.prompts import Prompted, check, linear


def last(start):
    """Zero for the part that makes P, where the method starts at zero."""
    return lambda shape, method, origin, gen: (zeros if method.start_at == "zero" else start)(shape, method, origin, gen)


@method("prefix", title="Prefix tuning", paper="2101.00190", formula="softmax(q [P_k; K]ᵀ) [P_v; V] in every layer")
class Prefix(Prompted):
    in_front = False
    inmost = True

    num_virtual_tokens: int = 20  # n, learnt pairs of key and value in each layer
    projection: bool = False  # P comes from a small network while training
    hidden: int = 0  # its width; 0: kv
    start_at: str = choice("normal", ("normal", "zero"))  # N(0, 1), or zero, which is not the base either
    depth: int = 0  # L, the model's layers; found out
    heads: int = 0  # its key-value heads; found out
    head_dim: int = 0  # the size of a head; found out
    decoder: bool = False  # of an encoder and decoder, only the decoder's own attention has it; found out
    crossed: bool = False  # as in PEFT's files of such models: layer l takes the pairs of layer 2 l mod L

    P = Leaf("num_virtual_tokens states", last(normal(1.0)), key="prompt_embeddings")
    E = Leaf("num_virtual_tokens kv", normal(1.0), key="prompt_encoder.embedding.weight")
    W1 = Leaf("hidden kv", linear("kv"), key="prompt_encoder.transform.0.weight")
    b1 = Leaf("hidden", linear("kv"), key="prompt_encoder.transform.0.bias")
    W2 = Leaf("states hidden", last(linear("hidden")), key="prompt_encoder.transform.2.weight")
    b2 = Leaf("states", last(linear("hidden")), key="prompt_encoder.transform.2.bias")

    def __post_init__(self):
        check(self, "num_virtual_tokens")

    @classmethod
    def examples(cls):
        return [cls(3, True, 6, "zero", 2, 2, 4, True, True), cls(4, depth=1, heads=1, head_dim=8)]

    @property
    def leaves(self):
        return {k: v for k, v in self.own.items() if (k == "P") != self.projection}

    def dims(self, o, i):
        kv = self.heads * self.head_dim
        return super().dims(o, i) | {"kv": kv, "states": 2 * self.depth * kv, "hidden": self.hidden or kv}

    def on(self, site):
        return self if site.whole != self.around_a else dataclasses.replace(
            self, decoder=site.pairs, depth=site.layers, heads=site.heads, head_dim=site.head_dim)

    def unfit(self, site):
        if why := super().unfit(site):
            return why
        if site.cached is None and not site.pairs:
            return f"prefix tuning fills a cache of keys and values, which {site.called} does not take; mend: prompt-tuning"
        return None

    def prefix(self, p):  # (n, 2 L kv)
        if not self.projection:
            return p["P"]
        return F.linear(torch.tanh(F.linear(p["E"], p["W1"], p["b1"])), p["W2"], p["b2"])

    def states(self, p, site):
        P = self.prefix(p).unflatten(1, (self.depth, 2, self.heads, self.head_dim))
        P = P[:, [2 * layer % self.depth for layer in range(self.depth)]] if self.crossed else P
        return P.permute(1, 2, 3, 0, 4)

    def size(self, p):
        return self.prefix(p).norm()

    def for_files(self, p):
        return dataclasses.replace(self, projection=False, hidden=0), {"P": self.prefix(p)}

    def to_peft(self):
        return None if self.projection or self.decoder != self.crossed else {
            "peft_type": "PREFIX_TUNING", "num_virtual_tokens": self.num_virtual_tokens, "num_layers": self.depth, "prefix_projection": False,
            "num_attention_heads": self.heads, "token_dim": self.heads * self.head_dim, "encoder_hidden_size": None, "init_weights": None}

    @classmethod
    def from_peft(cls, config):
        if config.get("peft_type") != "PREFIX_TUNING":
            return None
        heads, pairs = config["num_attention_heads"], config.get("num_transformer_submodules") == 2
        return cls(config["num_virtual_tokens"], decoder=pairs, crossed=pairs, depth=config["num_layers"], heads=heads, head_dim=config["token_dim"] // heads)
