"""Trainable token rows: some rows of an embedding, or of an output head, are replaced and train; the table stays.

    embedding (columns of the canonical W):  W'[:, indices] = Tᵀ        T (k, o), k tokens
    head (side "out", rows of W):            W'[indices, :] = T         T (k, i)

T starts at the table's own rows, so W' = W at step 0. New tokens cost k rows and not a copy of the table. PEFT has it as
`trainable_token_indices`; a head that is tied to the embedding has the same T.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.method import Leaf, Method, choice, method


def rows_of_the_base(shape, method, origin, gen):
    W = origin() if method.side == "out" else origin().mT
    if (top := max(method.indices)) >= len(W):
        raise LorakitError(f"tokens: there is no row {top}, the table has {len(W)}; mend: resize the embeddings first (resize_token_embeddings)")
    return W[list(method.indices)].detach().clone()


@method("tokens", title="Trainable token rows", formula="rows of W -> T", laws=("identity",), aliases=("trainable-tokens",))
class Tokens(Method):
    follows = True

    indices: tuple = (0,)  # the rows that train
    side: str = choice("in", ("in", "out"))  # rows are inputs (an embedding) or outputs (a head)

    def __post_init__(self):
        object.__setattr__(self, "indices", tuple(self.indices))
        if not self.indices or len(set(self.indices)) < len(self.indices) or min(self.indices) < 0:
            raise LorakitError(f"tokens: indices must be different numbers of rows, 0 or more, not {list(self.indices)}")

    @classmethod
    def examples(cls):
        return [cls((5, 1), "out"), cls((6, 4, 9), "in")]

    @property
    def leaves(self):
        return {"T": Leaf("k i" if self.side == "out" else "k o", rows_of_the_base, key="token_adapter.trainable_tokens_delta")}

    def dims(self, o, i):
        return super().dims(o, i) | {"k": len(self.indices)}

    def unfit(self, site):
        return None if (self.side == "in") == site.lookup else f"tokens with side `{self.side}` are not for this layer"

    def transposed(self):
        return dataclasses.replace(self, side="in" if self.side == "out" else "out")

    def at(self, device: torch.device) -> Tensor:
        return torch.tensor(self.indices, device=device)

    def weight(self, p, W):
        T = p["T"].to(W.dtype)
        return W.index_copy(0, self.at(W.device), T) if self.side == "out" else W.index_copy(1, self.at(W.device), T.mT)

    def act(self, p, x, f, site, drop):
        y = f(x)
        if self.side == "out":
            return super().act(p, x, f, site, drop) if site.slides or site.stack else y.index_copy(-1, self.at(y.device), site.op(x, p["T"].to(x.dtype)))
        hit = x[..., None] == self.at(x.device)  # (..., k)
        own = site.op(hit.to(torch.uint8).argmax(-1), p["T"].mT.to(site.dtype))
        return torch.where(hit.any(-1, keepdim=True), own, y)

    def to_peft(self):
        return {"trainable_token_indices": list(self.indices)}

    def to_dict(self):
        return super().to_dict() | {"indices": list(self.indices)}
