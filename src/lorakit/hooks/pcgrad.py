"""PCGrad: a task's gradient gives up what works against another task's. Yu et al., 2020, arXiv 2001.06782.

    for each task i, for the others j in random order:  if ĝ_i · g_j < 0:  ĝ_i := ĝ_i - (ĝ_i · g_j / |g_j|²) g_j          g = Σ ĝ_i

ĝ_i begins as g_i; g_j is always the task's own gradient. Over all that trains as one vector, before clipping. Under a Trainer every
batch has a tensor `task` with a number for each row; in a loop `step.backward([loss of task 0, loss of task 1, …])`. Costs a backward
pass for each task in a batch. Where no two tasks conflict the step is the ordinary one.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.surgery import draw


class Tasks(Hook):
    """What gradient surgeries have in common."""

    place = 10
    tasks: int
    step = 0

    def __post_init__(self):
        if self.tasks < 2:
            raise LorakitError(f"{self.name}: tasks must be at least 2, not {self.tasks}")

    def before_forward(self, model, step):
        self.step = step


@hook("pcgrad", "PCGrad", "2001.06782", "ĝ_i := ĝ_i - min(0, ĝ_i·g_j) g_j / |g_j|²")
class PCGrad(Tasks):
    tasks: int = 2  # how many tasks there are
    seed: int = 0  # of the order in which tasks meet

    def combine(self, model, grads):
        gen, out = draw(self.seed, self.step, "pcgrad"), torch.zeros_like(grads[0])
        for i, g in enumerate(grads):
            g = g.clone()
            for j in torch.randperm(len(grads), generator=gen).tolist():
                if i != j and (dot := g @ grads[j]) < 0:
                    g -= dot / (grads[j] @ grads[j]) * grads[j]
            out += g
        return out
