"""Prompt tuning: learnt tokens in front of the input. Lester et al., 2021, arXiv 2104.08691.

    model([P; E(x)]) in place of model(E(x));   no weight changes, W' = W

P (n, d) trains, n tokens of the embeddings' width d; encoders and decoders get it before the encoder's input. It starts at random rows
of the embedding ("vocab"), at the tokens of a text ("text", with `token_ids`, repeated or cut to n), at noise as large as the
embedding's own ("scaled"), or at N(0, 1) as in PEFT ("random", many times larger than most embeddings). Never the base's function at step 0.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.method import Leaf, choice, method
from lorakit.prompts import Prompted, check

STARTS = ("random", "scaled", "vocab", "text")


def begin(shape, method, origin, gen):
    n = shape[0]
    if method.start_at == "random":
        return torch.randn(shape, generator=gen)
    W = origin()  # (d, vocabulary)
    if method.start_at == "scaled":
        return torch.randn(shape, generator=gen) * W.square().mean().sqrt()
    ids = torch.randint(W.shape[1], (n,), generator=gen) if method.start_at == "vocab" else torch.tensor((method.token_ids * n)[:n])
    if int(ids.max()) >= W.shape[1]:
        raise LorakitError(f"prompt: there is no token {int(ids.max())}, the embedding has {W.shape[1]}")
    return W[:, ids].mT.contiguous().clone()


@method("prompt", title="Prompt tuning", paper="2104.08691", formula="model([P; E(x)])")
class Prompt(Prompted):
    num_virtual_tokens: int = 20  # n, learnt tokens
    start_at: str = choice("random", STARTS)  # random: N(0, 1); scaled: noise of the embedding's size; vocab: random rows; text: those of `token_ids`
    token_ids: tuple = ()  # ids of the text to start from
    copies: int = 1  # 2: PEFT keeps a second prompt for the decoder of an encoder and decoder, which it does not use

    P = Leaf("rows o", begin, key="prompt_embeddings")

    def __post_init__(self):
        object.__setattr__(self, "token_ids", tuple(self.token_ids))
        check(self, "num_virtual_tokens")
        if (self.start_at == "text") != bool(self.token_ids):
            raise LorakitError("prompt: start_at: text needs token_ids, those of a text, and they mean nothing with another start")

    @classmethod
    def examples(cls):
        return [cls(5, "text", (6, 4, 9), 2), cls(3, "vocab")]

    def dims(self, o, i):
        return super().dims(o, i) | {"rows": self.num_virtual_tokens * self.copies}

    def on(self, site):
        return self if not getattr(site, "pairs", False) else self.having(copies=2)

    def prompt(self, p, site):
        return p["P"][: self.num_virtual_tokens]

    def to_dict(self):
        return super().to_dict() | {"token_ids": list(self.token_ids)}

    def to_peft(self):
        return {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": self.num_virtual_tokens, "prompt_tuning_init": "RANDOM",
                "prompt_tuning_init_text": None, "tokenizer_name_or_path": None, "tokenizer_kwargs": None}

    @classmethod
    def from_peft(cls, config):
        if config.get("peft_type") not in ("PROMPT_TUNING", "P_TUNING", "CPT"):  # all three are saved as the tokens that they came to
            return None
        n = config.get("num_virtual_tokens") or len(config.get("cpt_token_ids") or [0])
        return cls(n, copies=config.get("num_transformer_submodules") or 1)
