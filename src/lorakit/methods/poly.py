"""Poly, multi-task skills: a router picks, for each task, a mixture of LoRA skills. Ponti et al., 2022, arXiv 2202.13914.

    W'_t = W + (1/r) (A_t B_t)ᵀ,   A_t = concat_q sum_s w_qs A_qs (i, r),   B_t likewise (r, o)
    w = p / sum_s p,   p = sigmoid(Z_t), in training a relaxed Bernoulli sample of it (temperature 1)

A (q, S, i/q, r) and B (q, S, r, o/q) hold S skills in q splits (q > 1: multi-head routing, arXiv 2211.03831), Z (tasks, q S) is the
router. A starts as LoRA's, B at zero, Z uniform in ±0.001, so W' = W at step 0. The tasks of a batch are given from outside,
`with lorakit.given(model, task_ids=ids)`; for one fixed `task` this is an ordinary update, which merges. In training the output is random.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.maps import spread
from lorakit.method import Leaf, LowRank, check_rank, kaiming, method, refuse, zeros


def tiny(shape, method, origin, gen):
    return (torch.rand(shape, generator=gen) * 2 - 1) * 1e-3


def transposed_kaiming(shape, method, origin, gen):
    return kaiming([*shape[:-2], shape[-1], shape[-2]], method, origin, gen).mT.contiguous()


@method("poly", title="Poly", paper="2202.13914", formula="W + (A_t B_t)ᵀ / r, mixtures of skills for task t", laws=("rank<=r", "identity"),
        aliases=("polytropon", "mhr"))
class Poly(LowRank):
    asks = ("task_ids",)

    r: int = 8  # rank
    n_tasks: int = 1  # tasks the router knows
    n_skills: int = 4  # skills S
    n_splits: int = 1  # heads q of the router; they must divide inputs and outputs
    task: int = -1  # the task, where there is but one; -1: given with the batch

    A = Leaf("n_splits n_skills iq r", transposed_kaiming, key="poly_lora_A")
    B = Leaf("n_splits n_skills r oq", zeros, key="poly_lora_B")
    Z = Leaf("n_tasks qs", tiny, key="poly_router.module_logits")

    def __post_init__(self):
        check_rank("poly", self.r)
        if not -1 <= self.task < self.n_tasks:
            raise LorakitError(f"poly: task must be from 0 to {self.n_tasks - 1}, or -1, not {self.task}")

    @classmethod
    def examples(cls):
        return [cls(3, 4, 3, 2, 1), cls(2, 2, 2, 1, 0)]

    @property
    def mergeable(self):
        return "exact" if self.task >= 0 or self.n_tasks == 1 else "no"

    def to_peft(self):
        if self.task >= 0:
            return None
        return {"peft_type": "POLY", "poly_type": "poly", "init_weights": True} | {k: getattr(self, k) for k in ("r", "n_tasks", "n_skills", "n_splits")}

    @classmethod
    def from_peft(cls, config):
        if config.get("peft_type") != "POLY":
            return None
        refuse(config, poly_type="poly")
        return cls(config.get("r", 8), config.get("n_tasks", 1), config.get("n_skills", 4), config.get("n_splits", 1))

    def dims(self, o, i):
        q = self.n_splits
        return super().dims(o, i) | {"iq": i // q, "oq": o // q, "qs": q * self.n_skills}

    def unfit(self, site):
        q = self.n_splits
        if site.read and self.mergeable == "no":
            return "poly needs the tasks of a batch, and this parameter is read, not called; mend: a fixed task"
        return f"poly: {q} splits do not divide {site.out} outputs and {site.in_} inputs; mend: n_splits that do" if site.out % q or site.in_ % q else None

    def mixed(self, p, Z):  # Z (…, q S) -> B (…, o, r), A (…, r, i)
        w = Z.sigmoid().unflatten(-1, (self.n_splits, self.n_skills))
        w = w / (w.sum(-1, keepdim=True) + 1e-12)
        A, B = torch.einsum("...qs,qsir->...qir", w, p["A"]), torch.einsum("...qs,qsro->...qro", w, p["B"])
        return B.transpose(-3, -2).flatten(-2).mT / self.r, A.flatten(-3, -2).mT

    def size(self, p):
        return p["B"].float().norm()

    def factors(self, p):
        if self.mergeable == "no":
            raise LorakitError("poly: which task? mend: with lorakit.given(model, task_ids=…), or the field task for one of them")
        return self.mixed(p, p["Z"][max(self.task, 0)])

    def update(self, p, x, f, site, drop):
        dtype = x.dtype if x.is_floating_point() else site.dtype
        train, x = site.module.training, drop(x)
        if "task_ids" not in p or self.task >= 0:
            if not train:
                return super().update(p, x, f, site, lambda x: x)
            self.factors(p)  # says what is missing
            ids = torch.full((1,), max(self.task, 0), device=p["Z"].device)
        else:
            ids = spread(p["task_ids"].cpu(), len(x)).to(p["Z"].device)
        Z = p["Z"][ids]
        B, A = self.mixed(p, Z + torch.rand_like(Z).clamp(1e-6, 1 - 1e-6).logit() if train else Z)
        if len(ids) == 1:
            return site.chain(x, B[0].to(dtype), A[0].to(dtype))
        if site.slides or site.lookup or x.dim() < 2:
            return torch.cat([site.chain(x[n : n + 1], B[n].to(dtype), A[n].to(dtype)) for n in range(len(x))])
        return torch.einsum("b...r,bor->b...o", torch.einsum("b...i,bri->b...r", x, A.to(dtype)), B.to(dtype))
