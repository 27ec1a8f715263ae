"""Adaption prompt (LLaMA-Adapter): a second, gated attention to learnt tokens. Zhang et al., 2023, arXiv 2303.16199.

    y + g softmax(q (P Wkᵀ)ᵀ / sqrt(dh)) (P Wvᵀ) Woᵀ,   y the attention's own output;   no weight changes, W' = W

P (1, K, d) starts at N(0, 1) and the gate at zero, so the output is the base's at step 0. "scalar": one g for the attention, as PEFT has
it; "heads": tanh(g_h), one for each head, as in the authors' code (their files and PEFT's are not interchangeable). The softmax is one of
its own, not joint with the text's. Queries carry their rotation, the learnt keys do not. Usually on the last layers (`adapter_layers`).
"""

from __future__ import annotations

import dataclasses

import torch

from lorakit.method import Around, Leaf, Part, choice, method, normal, zeros
from lorakit.prompts import Columns, check


def rotated(q, cos, sin):
    half = q.shape[-1] // 2
    turned = torch.cat([-q[..., half:], q[..., :half]], -1)
    return q * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def beside(parts, index, inner, call, site):
    """The attention's answer with the second attention of every row's adapter; the projections see the rows of the whole batch."""
    y, *rest = inner(call)
    m, x = site.module, call.given["hidden_states"]
    b, t, dh = *x.shape[:2], m.head_dim
    cols = Columns([p["P"][0] for _, _, p in parts], index).over(b)
    n = 1 if cols.index is None else b
    q = rotated(m.q_proj(x).view(b, t, -1, dh).transpose(1, 2), *call.given["position_embeddings"])
    P = cols.of(n).to(x.dtype)
    k, v = (f(P).view(n, cols.n, -1, dh).transpose(1, 2) for f in (m.k_proj, m.v_proj))  # (n, kv heads, K, dh)
    k, v = (s.repeat_interleave(q.shape[1] // s.shape[1], 1) for s in (k, v))
    scores = q @ k.mT * dh**-0.5
    if not cols.even:
        scores = scores.masked_fill(~cols.ahead(b, x.device)[:, None, None], torch.finfo(scores.dtype).min)
    g = cols.of(n, [part.method.gates(part.p, q.shape[1]) for part in parts])[..., None]  # (n, heads, 1, 1)
    more = m.o_proj(((g * scores.softmax(-1, torch.float32)).to(x.dtype) @ v).transpose(1, 2).reshape(b, t, -1))
    more = more if getattr(m.o_proj, "bias", None) is None else more - m.o_proj.bias  # the attention has added it
    more = more if cols.even else torch.where(cols.counts[:, None, None].to(x.device) > 0, more, 0)
    return y + more.to(y.dtype), *rest


@method("adaption-prompt", title="Adaption prompt", paper="2303.16199", formula="y + g softmax(q (P Wkᵀ)ᵀ) (P Wvᵀ) Woᵀ", laws=("identity",))
class AdaptionPrompt(Around):
    around_a = "attention"
    mixed = staticmethod(beside)

    adapter_len: int = 10  # K, learnt tokens in each layer
    gate: str = choice("scalar", ("scalar", "heads"))  # one number, as in PEFT; or one with a tanh for each head, as the authors
    heads: int = 0  # the attention's heads; found out

    def __post_init__(self):
        check(self, "adapter_len")

    @classmethod
    def examples(cls):
        return [cls(3, "heads", 4), cls(4)]

    @property
    def leaves(self):
        gate = "one" if self.gate == "scalar" else "one heads one one"
        return {"P": Leaf("one adapter_len i", normal(1.0), key="adaption_prompt"), "g": Leaf(gate, zeros, key="adaption_gate")}

    def dims(self, o, i):
        return super().dims(o, i) | {"one": 1}

    def on(self, site):
        return dataclasses.replace(self, heads=site.heads) if site.whole == self.around_a else self

    def unfit(self, site):
        if why := super().unfit(site):
            return why
        if "position_embeddings" not in site.names or hasattr(site.module, "q_norm"):
            return f"adaption-prompt knows attention as Llama has it, which {site.called} is not"
        return None

    def around(self, p, inner, call, site):
        return beside([Part("", self, p)], None, inner, call, site)

    def gates(self, p, heads):  # (heads, 1)
        return (p["g"] if self.gate == "scalar" else p["g"].tanh()).view(-1, 1).expand(heads, 1)

    def size(self, p):
        return p["P"].norm() * p["g"].norm()

    def to_peft(self):
        return {"peft_type": "ADAPTION_PROMPT", "adapter_len": self.adapter_len, "adapter_layers": 0, "target_modules": "self_attn"} \
            if self.gate == "scalar" else None

    @classmethod
    def from_peft(cls, config):
        return cls(config["adapter_len"]) if config.get("peft_type") == "ADAPTION_PROMPT" else None
