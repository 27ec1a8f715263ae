"""VB-LoRA: all factors composed from one bank of vectors. Li et al., 2024, arXiv 2405.15179.

    W' = W + B A;   A[i, tb:(t+1)b] = sum_j w_j V[j],   B[tb:(t+1)b, i] likewise,   w = softmax(the k largest logits)

V (h, b), the bank, is one for the whole model and trains; each length-b piece of a row of A or a column of B is a mixture of k of its h
vectors, chosen anew at every call by that piece's own logits: la (r, i/b, h), lb (o/b, r, h). The softmax is over the chosen only, and
only they have a gradient. b must divide inputs and outputs. The bank starts uniform in ±0.02 and the logits normal, so at step 0 W' is
close to W and not equal to it, as in the paper. A file may keep the k indices and k-1 weights of each piece
instead of the logits: small, but not trainable any more.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.method import Leaf, LowRank, check_rank, method


def bank(shape, method, origin, gen):
    return (torch.rand(shape, generator=gen) * 2 - 1) * method.init_vector_bank_bound


def logits(shape, method, origin, gen):
    return torch.randn(shape, generator=gen) * method.init_logits_std


@method("vblora", title="VB-LoRA", paper="2405.15179", formula="W + B A, pieces of A and B are mixtures from one bank", laws=("rank<=r",), aliases=("vb-lora",))
class VBLoRA(LowRank):
    peft_layers = ("linear", "transposed")
    peft_dropout = "vblora_dropout"

    r: int = 4  # rank
    num_vectors: int = 256  # h, vectors in the bank
    vector_length: int = 256  # b, must divide inputs and outputs
    topk: int = 2  # k, vectors in a mixture
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    V = Leaf("num_vectors vector_length", bank, shared="model", key="vblora_vector_bank")
    la = Leaf("r ni num_vectors", logits, key="vblora_logits_A")
    lb = Leaf("no r num_vectors", logits, key="vblora_logits_B")

    def __post_init__(self):
        check_rank("vblora", self.r)
        if not 1 <= self.topk <= self.num_vectors:
            raise LorakitError(f"vblora: topk must be from 1 to num_vectors ({self.num_vectors}), not {self.topk}")

    @classmethod
    def examples(cls):
        return [cls(3, 5, 4, 3, 0.6, 0.5)]

    def dims(self, o, i):
        return super().dims(o, i) | {"no": o // self.vector_length, "ni": i // self.vector_length}

    def unfit(self, site):
        b = self.vector_length
        bad = site.out % b or site.in_ % b
        return f"vblora: vector_length {b} does not divide {site.out} outputs and {site.in_} inputs; mend: one that does" if bad else None

    def mixture(self, z, V):  # (…, h) -> (…, b)
        top, at = z.topk(self.topk, -1)
        return (top.softmax(-1)[..., None] * V[at]).sum(-2)

    def factors(self, p):
        B = self.mixture(p["lb"], p["V"])  # (o/b, r, b)
        return B.transpose(1, 2).flatten(0, 1), self.mixture(p["la"], p["V"]).flatten(1)

    def to_peft(self):
        names = ("r", "num_vectors", "vector_length", "topk", "init_vector_bank_bound", "init_logits_std")
        return {"peft_type": "VBLORA", "save_only_topk_weights": False, "fan_in_fan_out": False} | {k: getattr(self, k) for k in names}

    @classmethod
    def from_peft(cls, config):
        names = ("r", "num_vectors", "vector_length", "topk", "init_vector_bank_bound", "init_logits_std")
        return cls(**{k: config[k] for k in names if k in config}) if config.get("peft_type") == "VBLORA" else None

    def restored(self, config, tensors):
        out = dict(tensors)
        for k in [k for k in tensors if k.endswith("_topk_indices")]:
            base = k.removesuffix("_topk_indices")
            at, w = out.pop(k).long(), out.pop(f"{base}_topk_weights").float()
            w = torch.cat([w, 1 - w.sum(-1, keepdim=True)], -1).clamp_min(1e-30).log()
            out[base] = torch.full((*w.shape[:-1], self.num_vectors), -1e4).scatter(-1, at, w)  # what is not among the chosen counts for nothing
        return out
