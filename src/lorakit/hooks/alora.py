"""ALoRA: ranks move to the layers that need them, by what the model loses without them. Liu et al., 2024, arXiv 2403.16187.

    W' = W + s B diag(g) A, g of zeros and ones that do not train;   S = -loss on one fixed batch
    importance of component k:   S(all) - S(without k) + S(of its matrix k alone)
    `rounds` times: the `moved` lowest of the whole model close, and as many open on targets that lost none, evenly, the most important first

The budget is target_r components for each matrix throughout; r of the adapter is the most that one can have. A component that opens is
a no-op: its row of A starts anew, its column of B and the optimiser's memory of both at zero. The batch is the first one of training.
A round costs two forward passes for each open component. Not to be confused with activated LoRA, which PEFT calls alora.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.hooks import surgery
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.components import Gated, gated, whole_here


@hook("alora", "ALoRA", "2403.16187", "components move to where leaving them out costs most")
class ALoRA(Hook):
    target_r: int = 4  # components open for each matrix on average
    first: int = 100  # steps before the first round
    every: int = 25  # steps from one round to the next
    rounds: int = 8  # how often components move
    moved: int = 0  # components that move in a round; 0: one for each target
    seed: int = 0  # of components that start anew

    place = 80

    def __post_init__(self):
        if self.target_r < 1 or self.first < 1 or self.every < 1 or self.rounds < 0 or self.moved < 0:
            raise LorakitError(f"alora: target_r, first and every are at least 1, rounds and moved at least 0, not {self}")

    @torch.no_grad()
    def setup(self, model):
        self.of, self.batch = gated(model, "alora"), None
        for g in self.of:
            if g.r <= self.target_r:
                raise LorakitError(f"alora: {g.path} has rank {g.r}, no more than target_r = {self.target_r}; mend: a higher r (2 × target_r, say)")
            if not ((g.gate == 0) | (g.gate == 1)).all() or bool((g.gate == 1).all()):
                if g.B.any() and g.A.any():
                    raise LorakitError(f"alora: {g.path} has gates that are not 0 or 1 and has trained; mend: sora, or trilora with begin: identity")
                g.flat(g.gate).copy_((torch.arange(g.r) < self.target_r).expand(g.many, g.r))
            g.gate.requires_grad_(False)
        self.handles = [model.register_forward_pre_hook(self._note, with_kwargs=True)]

    def start(self, model, optimizer, total):
        whole_here((g.A for g in self.of), "alora")

    def _note(self, module, args, kwargs):
        if self.batch is None and module.training and "labels" in kwargs:
            self.batch = {k: v.detach().clone() for k, v in kwargs.items() if isinstance(v, Tensor) and k != "num_items_in_batch"}

    def _loss(self, model) -> float:
        return float(model(**self.batch).loss)

    @torch.no_grad()
    def importance(self, model) -> list[Tensor]:
        """Of every component, (matrices, r) for each target, up to what all have in common; infinite where it is closed."""
        if self.batch is None:
            raise LorakitError("alora: no batch with labels was seen, called by name; mend: model(input_ids=…, labels=…)")
        train, out = model.training, []
        model.eval()
        for g in self.of:
            gate, scores = g.flat(g.gate), torch.full((g.many, g.r), torch.inf, dtype=torch.float64)
            for n, k in (gate != 0).nonzero().tolist():
                was = gate[n].clone()
                gate[n, k] = 0
                without = self._loss(model)
                gate[n] = 0
                gate[n, k] = 1
                scores[n, k] = without - self._loss(model)
                gate[n] = was
            out.append(scores)
        model.train(train)
        if dist.is_available() and dist.is_initialized():
            for s in out:
                dist.all_reduce(s)
        return out

    def plan(self, scores: list[Tensor]) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        """(target, matrix, component) of what closes, the lowest first, and of what opens."""
        live = sorted((float(s[n, k]), t, n, k) for t, s in enumerate(scores) for n, k in s.isfinite().nonzero().tolist())
        for many in range(min(self.moved or len(self.of), len(live)), 0, -1):
            closed = [c[1:] for c in live[:many]]
            lost = {t for t, _, _ in closed}
            room = {t: (~s.isfinite()).nonzero().tolist() for t, s in enumerate(scores) if t not in lost}
            order = sorted(room, key=lambda t: -float(scores[t][scores[t].isfinite()].mean()) if scores[t].isfinite().any() else 0.0)
            opened: list[tuple[int, int, int]] = []
            while len(opened) < many and any(room.values()):
                for t in order:
                    if room[t] and len(opened) < many:
                        opened.append((t, *room[t].pop(0)))
            if len(opened) == many:
                return closed, opened
        return [], []

    def on_interval(self, model, optimizer, scheduler, step):
        if step < self.first or (step - self.first) % self.every or (step - self.first) // self.every >= self.rounds:
            return
        closed, opened = self.plan(self.importance(model))
        with torch.no_grad():
            for t, n, k in closed:
                self.of[t].flat(self.of[t].gate)[n, k] = 0
            for t, n, k in opened:
                self._open(optimizer, self.of[t], n, k, step)

    def _open(self, optimizer, g: Gated, n: int, k: int, step: int) -> None:
        g.flat(g.gate)[n, k] = 1
        A, B = (x.view(-1, *x.shape[-2:])[n] for x in (g.A, g.B))
        gen = surgery.draw(self.seed, step, f"{g.key('A')} {n} {k}")
        A[k] = ((torch.rand(A.shape[-1], generator=gen) * 2 - 1) * A.shape[-1] ** -0.5).to(A)
        B[:, k] = 0
        for p, at in ((g.A, (n, k)), (g.B, (n, slice(None), k))):
            for _, m in surgery.memory(optimizer, p):
                m.view(-1, *p.shape[-2:])[at] = 0

    def ranks(self) -> dict[str, int]:
        """Target -> open components; of a stack those of all its matrices."""
        return {g.path: int((g.gate != 0).sum()) for g in self.of}

    def close(self, model):
        for h in self.handles:
            h.remove()
        for g in self.of:
            g.gate.requires_grad_(True)

    def state_dict(self):
        return {"batch": self.batch}

    def load_state_dict(self, state):
        self.batch = state["batch"]
