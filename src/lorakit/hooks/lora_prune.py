"""LoRAPrune: heads and channels of the base are pruned while a LoRA trains, told by the LoRA's gradients alone. Zhang et al., 2023, arXiv 2305.18403.

    G = gB A + B gA - gB gA   (what a step would take from B A),   S = |G ∘ (W + s B A)|   (o, i)
    one head or channel:  Σ of S over its rows of q, k, v, gate, up and its columns of o, down;  these over the groups of a block, divided by
    their norm in each layer and summed over its layers, averaged over steps:  s̄ := β s̄ + (1 - β) s
    every k steps:  m := 0 for the int(n ρ(t)) groups of each block that have the lowest s̄, pruned ones first
    ρ(t) = ratio + (first - ratio) (1 - (t - wT) / ((1 - c - w) T))³ between the steps wT and (1 - c) T, `first` before, `ratio` after

A head is one key-value head with the queries that share it; a channel is one of the feed-forward part between its two matrices. Only outputs are
masked, with their biases: where the value is zero, or the channel and so its activation, nothing of the group reaches the block's sum, and the
layer behind needs no mask. The masks are leaves of the method lora-prune, kept with the adapter; merged, the rows are zero, and `pruned` of
`hooks/groups.py` makes a smaller model of it. No group comes back. The first tenth of the blocks and the last one stay whole, so that less than
`ratio` of the model goes. The last pruning is at (1 - c) T, where the public code, which prunes at multiples of k below `ratio` only, ends short
of it. W is read in float32.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.components import cubic, known_total, lowest, whole_here
from lorakit.hooks.factors import block_of
from lorakit.hooks.groups import prunable


@hook("lora_prune", "LoRAPrune", "2305.18403", "heads and channels with the lowest |(gB A + B gA - gB gA) ∘ W| are masked")
class LoRAPrune(Hook):
    ratio: float = 0.5  # part of each block's heads and channels that is gone in the end
    first: float = 0.0  # part that goes in the warm-up
    warmup: float = 0.1  # w: part of the training in which no more goes
    rest: float = 0.1  # c: part of the training, its end, in which nothing goes
    every: int = 10  # k: steps from one pruning to the next
    beta: float = 0.9  # of the scores' average
    spare_first: float = 0.1  # part of the model's blocks, its first, that stays whole
    spare_last: int = 1  # blocks at its end that stay whole

    def __post_init__(self):
        if not 0 <= self.first <= self.ratio < 1 or self.warmup < 0 or self.rest < 0 or self.warmup + self.rest >= 1 or self.every < 1 \
                or not 0 <= self.beta < 1 or not 0 <= self.spare_first < 1 or self.spare_last < 0:
            raise LorakitError("lora_prune: 0 <= first <= ratio < 1; warmup and rest are parts of the training, together below 1; every is at least 1, beta "
                               f"and spare_first from 0 to below 1, spare_last at least 0, not {self}")

    def setup(self, model):
        every, self.mean = prunable(model), {}
        depth = list(dict.fromkeys(block_of(b.path) for b in every))
        spared = {*depth[: int(self.spare_first * len(depth))], *depth[len(depth) - self.spare_last :]}
        self.of = [b for b in every if block_of(b.path) not in spared]
        if not self.of:
            raise LorakitError(f"lora_prune: all {len(depth)} blocks with masks are spared; mend: a lower spare_first or spare_last, or more targets")

    def start(self, model, optimizer, total):
        whole_here((t for b in self.of for p in b.layers.values() for t in (p.A, p.B)), "lora_prune")
        self.T = known_total(total, "lora_prune")
        self.last = self.T - int(self.rest * self.T)

    def share(self, t: int) -> float:
        """ρ after t steps."""
        return self.ratio + (self.first - self.ratio) * cubic(t, self.warmup * self.T, self.last)

    def before_step(self, model, optimizer, step):
        for b in self.of if step < self.last else ():
            if (s := b.scores()).isfinite().all():
                self.mean[b.key] = self.beta * self.mean.get(b.key, torch.zeros_like(s)) + (1 - self.beta) * s

    @torch.no_grad()
    def after_step(self, model, optimizer, step):
        t = step + 1
        if t > self.last or (t % self.every and t != self.last):
            return
        for b in self.of:
            if b.key in self.mean:
                gone = lowest([self.mean[b.key].masked_fill(~b.alive().cpu(), -1.0)], int(b.n * self.share(t) + 1e-9))[0]
                for m in b.masks:
                    m[gone.to(m.device)] = 0

    def left(self) -> dict[str, tuple[int, int]]:
        """Heads or channels of a block -> (how many are left, of how many)."""
        return {b.key: (int(b.alive().sum()), b.n) for b in self.of}

    def summary(self):
        kinds: dict[str, list[tuple[int, int]]] = {}
        for k, many in self.left().items():
            kinds.setdefault(k.rpartition(" ")[2], []).append(many)
        return ", ".join(f"{sum(a for a, _ in of)} of {sum(n for _, n in of)} {k} left in {len(of)} blocks" for k, of in kinds.items())

    def state_dict(self):
        return {"mean": dict(self.mean)}

    def load_state_dict(self, state):
        self.mean = dict(state["mean"])
