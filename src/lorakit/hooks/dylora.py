"""DyLoRA: every rank up to r from one training. Valipour et al., 2022, arXiv 2210.07558.

    in every step b ~ {1, …, r},   W' = W + s(b) B[:, :b] A[:b],   s(b) = alpha / b

With `frozen` only row b of A and column b of B train, the first b - 1 stand still; else all b. What stands still is not moved by decay or
momentum either, and its averages in the optimiser wait: each row has an optimiser's memory of its own (the counter is common). One b
for all targets, from the seed and the step. alpha belongs to every rank alike: `at_rank` takes out an adapter of any rank with the same
alpha, so that its scale is s(b). Evaluation in between sees all of r.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from lorakit import host
from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.factors import Pair, pairs
from lorakit.hooks.surgery import draw, memory
from lorakit.method import Method, choice
from lorakit.recipes import compose
from lorakit.spec import attach


def nested(method: Method, what: str, path: str) -> None:
    """Refuses a method whose first b ranks are not this method at rank b."""
    leaves = method.core.leaves
    if not hasattr(method.core, "s") or not hasattr(method.core, "r") or {leaves[k].axes for k in "AB"} != {"r i", "o r"} or leaves["A"].shared or \
            leaves["B"].shared:
        raise LorakitError(f"{what}: {path} has {method.core.name}, of which the first rows are not the same method at a lower rank; mend: lora")


@hook("dylora", "DyLoRA", "2210.07558", "W + s(b) B[:, :b] A[:b], b drawn in every step")
class DyLoRA(Hook):
    frozen: bool = True  # only row b of A and column b of B train; else the first b
    sampling: str = choice("uniform", ("uniform", "geometric"))  # of b; geometric: P(b) halves from each rank to the next
    seed: int = 0  # of the draws

    place = 40

    def setup(self, model):
        self.pairs, self.kept, self.scales = pairs(model, "dylora"), [], {}
        for p in self.pairs:
            nested(p.method, "dylora", p.path)
        self.handles = [t.register_hook(partial(self._masked, id(t))) for p in self.pairs for t in (p.A, p.B) if t.requires_grad]
        self.r = max(p.r for p in self.pairs)

    def _masked(self, which: int, g):
        return g * self.scales[which] if which in self.scales else g

    def rank(self, step: int) -> int:
        """b of this step; a target of lower rank takes all it has."""
        weights = torch.ones(self.r) if self.sampling == "uniform" else 0.5 ** torch.arange(self.r)
        return int(torch.multinomial(weights.double(), 1, generator=draw(self.seed, step, "rank"))) + 1

    def trained(self, pair: Pair, t: nn.Parameter, b: int) -> torch.Tensor:
        """True, (r, 1) or (r), where this leaf's entries train at rank b."""
        k = torch.arange(pair.r, device=t.device)
        on = (k == min(b, pair.r) - 1) if self.frozen else k < b
        return on[:, None] if t is pair.A else on

    @torch.no_grad()
    def before_forward(self, model, step):
        b = self.rank(step)
        for p in self.pairs:
            n = min(b, p.r)
            gain = p.method.core.having(r=n).s / p.method.core.s
            for t, factor in ((p.A, 1.0), (p.B, gain)):
                k = torch.arange(p.r, device=t.device) < n
                self.kept.append((p, t, t.detach().clone()))
                t.mul_((k[:, None] if t is p.A else k) * factor)
                self.scales[id(t)] = self.trained(p, t, b) * factor

    @torch.no_grad()
    def _whole(self):
        for _, t, before in self.kept:
            t.copy_(before)
        self.kept, self.scales = [], {}

    @torch.no_grad()
    def before_step(self, model, optimizer, step):
        self._whole()
        b, self.waits = self.rank(step), []
        for p in self.pairs:
            for t in (p.A, p.B):
                if t.requires_grad:
                    on = self.trained(p, t, b)
                    self.waits.append((t, on, t.detach().clone(), {k: m.clone() for k, m in memory(optimizer, t)}))

    @torch.no_grad()
    def after_step(self, model, optimizer, step):
        for t, on, before, was in self.waits:
            t.copy_(torch.where(on, t, before))
            for k, m in memory(optimizer, t):
                m.copy_(torch.where(on, m, was.get(k, torch.zeros_like(m))))
        self.waits = []

    def close(self, model):
        self._whole()
        for h in self.handles:
            h.remove()


@torch.no_grad()
def at_rank(model: nn.Module, name: str, rank: int, new_name: str) -> None:
    """Puts the first `rank` ranks of an adapter on the model as one of its own, beside it and not active; alpha stays, so the scale is that of the rank."""
    state = host.known(model, [name])
    if new_name in state.specs:
        raise LorakitError(f"at_rank: the model has an adapter `{new_name}` already")
    there = {p: s for p, s in host.slots(model, name).items() if name not in s.tied}
    plan: dict[str, Method] = {}
    for path, slot in there.items():
        m = plan[path] = slot.methods[name]
        if "r" in {a for leaf in m.leaves.values() for a in leaf.axes.split()}:
            nested(m, "at_rank", path)
            if not 1 <= rank <= m.core.r:
                raise LorakitError(f"at_rank: {path} has the ranks 1 to {m.core.r}, not {rank}")
            plan[path] = m.having(r=rank)
    was, active = state.specs[name], dict(state.active)
    spec = compose(was.method.having(r=rank), target_modules=[p for p, m in plan.items() if not m.replaces])
    attach(model, new_name, compose(spec, tie=was.tie, dropout=was.dropout), plan, empty=True)
    state.active = active
    for path, slot in there.items():
        new, old = host.slots(model, new_name)[path].parameters(new_name), slot.parameters(name)
        for leaf, t in new.items():
            t.copy_(old[leaf][tuple(slice(n) for n in t.shape)])
