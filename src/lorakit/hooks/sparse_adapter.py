"""SparseAdapter: a part of the factors' entries is taken out once, by a score, and stays out. He et al., 2022, arXiv 2210.04284.

    w := m ⊙ w from step `at` on, m = 0 for the int((1 - keep) N + ½) entries of the lowest score
    rand: random;  mag: |w|;  snip: |w · ∂L/∂w|;  grasp: -w · (H ∂L/∂w);  synflow: |w| · ∂R/∂w, R the sum of outputs when every weight is |w|

Among all factors (`scope: global`) or in each tensor apart. The masks never change; masked entries are zero after every step, whatever
momentum and decay do. Scores with a gradient are all zero while one factor is, hence the steps before. grasp and synflow run the model
once more on the batch of that step: H is of its loss, R of its logits, and synflow makes all weights of the model positive meanwhile. The
authors' option `sparsity` is the part that is kept; here it is called so. Large-Sparse: k times the rank and keep: 1/k.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.components import lowest, whole_here
from lorakit.hooks.factors import pairs
from lorakit.hooks.surgery import draw
from lorakit.method import choice


@hook("sparse_adapter", "SparseAdapter", "2210.04284", "factors ∘ a mask of the highest scores")
class SparseAdapter(Hook):
    score: str = choice("snip", ("rand", "mag", "snip", "grasp", "synflow"))  # what an entry's worth is
    keep: float = 0.5  # part of the entries that stays
    at: int = 10  # step, counted from 0, at which the mask is made
    scope: str = choice("global", ("global", "local"))  # compared among all factors, or in each tensor
    seed: int = 0  # of random scores

    def __post_init__(self):
        if not 0 < self.keep <= 1 or self.at < 0:
            raise LorakitError(f"sparse_adapter: keep is above 0 and at most 1, at a step from 0, not {self.keep}, {self.at}")

    def setup(self, model):
        self.of = {f"{p.path} {p.adapter} {k}": t for p in pairs(model, "sparse_adapter") for k, t in (("A", p.A), ("B", p.B)) if t.requires_grad}
        self.masks: dict[str, Tensor] = {}
        self.given: dict[str, Any] | None = None
        again = self.score in ("grasp", "synflow")
        self.handles = [model.register_forward_pre_hook(self._note, with_kwargs=True)] if again else []

    def start(self, model, optimizer, total):
        whole_here(self.of.values(), "sparse_adapter")
        if total and total <= self.at:
            raise LorakitError(f"sparse_adapter: training has {total} steps and would end before step {self.at}; mend: a smaller `at`")

    def _note(self, module, args, kwargs):
        if not self.masks and module.training:
            self.given = None if args else kwargs

    def before_step(self, model, optimizer, step):
        if step != self.at or self.masks:
            return
        params = list(self.of.values())
        if self.score in ("grasp", "synflow"):
            if self.given is None:
                raise LorakitError(f"sparse_adapter: {self.score} runs the model again, and it was called without names; mend: model(input_ids=…, labels=…)")
            train = model.training
            with torch.enable_grad():
                scores = self._grasp(model.eval(), params) if self.score == "grasp" else self._synflow(model.eval(), params)
            model.train(train)
            self.given = None
            if dist.is_available() and dist.is_initialized():  # every process saw other rows
                for s in scores:
                    dist.all_reduce(s)
        elif self.score == "rand":
            scores = [torch.rand(p.shape, generator=draw(self.seed, 0, k)).to(p.device) for k, p in self.of.items()]
        else:
            scores = [p.detach().abs() if self.score == "mag" else torch.zeros_like(p) if p.grad is None else (p.detach() * p.grad).abs() for p in params]
        if self.score != "rand" and not any(s.any() for s in scores):
            raise LorakitError(f"sparse_adapter: every score at step {step} is zero, so nothing tells the entries apart; mend: a larger `at`")
        gone = [lowest([s], int((1 - self.keep) * s.numel() + 0.5))[0] for s in scores] if self.scope == "local" else \
            lowest(scores, int((1 - self.keep) * sum(s.numel() for s in scores) + 0.5))
        self.masks = {k: ~m for k, m in zip(self.of, gone, strict=True)}

    def _grasp(self, model, params) -> list[Tensor]:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused kernels have no second derivative
            grads = torch.autograd.grad(model(**self.given).loss, params, create_graph=True)
            second = torch.autograd.grad(sum((g * g.detach()).sum() for g in grads), params)
        return [-p.detach() * h for p, h in zip(params, second, strict=True)]

    def _synflow(self, model, params) -> list[Tensor]:
        every = [p for p in model.parameters() if p.is_floating_point()]
        kept = [p.detach().clone() for p in every]
        try:
            with torch.no_grad():
                for p in every:
                    p.abs_()
            out = model(**{k: v for k, v in self.given.items() if k != "labels"})
            grads = torch.autograd.grad(out.logits.sum(), params)
            return [(p.detach() * g).abs() for p, g in zip(params, grads, strict=True)]
        finally:
            with torch.no_grad():
                for p, before in zip(every, kept, strict=True):
                    p.copy_(before)

    @torch.no_grad()
    def after_step(self, model, optimizer, step):
        for k, m in self.masks.items():
            self.of[k].mul_(m.to(self.of[k].device))

    def close(self, model):
        for h in self.handles:
            h.remove()

    def state_dict(self):
        return {"masks": dict(self.masks)}

    def load_state_dict(self, state):
        self.masks = dict(state["masks"])
