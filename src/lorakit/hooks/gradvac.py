"""GradVac: tasks' gradients are turned until they are as alike as they usually are. Wang et al., 2021, arXiv 2010.05874.

    φ = cos(ĝ_i, g_j);   if φ < φ̂_ij:   ĝ_i := ĝ_i + |ĝ_i| (φ̂ √(1 - φ²) - φ √(1 - φ̂²)) / (|g_j| √(1 - φ̂²)) · g_j;    φ̂ := (1 - β) φ̂ + β φ

Afterwards cos(ĝ_i, g_j) = φ̂. φ̂ starts at 0, where it is PCGrad, and is updated at every meeting of two tasks, whether or not anything is
turned. g = Σ ĝ_i. How the tasks are given: see `pcgrad`.
"""

from __future__ import annotations

import torch

from lorakit.hooks.base import hook
from lorakit.hooks.pcgrad import Tasks
from lorakit.hooks.surgery import draw


@hook("gradvac", "GradVac", "2010.05874", "turns ĝ_i until cos(ĝ_i, g_j) = φ̂_ij")
class GradVac(Tasks):
    tasks: int = 2  # how many tasks there are
    beta: float = 1e-2  # how fast the expected cosine follows
    seed: int = 0  # of the order in which tasks meet

    def setup(self, model):
        self.expected = torch.zeros(self.tasks, self.tasks, dtype=torch.float64)

    def combine(self, model, grads):
        gen, out, sizes = draw(self.seed, self.step, "gradvac"), torch.zeros_like(grads[0]), grads.norm(dim=1).tolist()
        for i, g in enumerate(grads):
            g = g.clone()
            for j in torch.randperm(len(grads), generator=gen).tolist():
                mine = float(g.norm())
                if i == j or not mine or not sizes[j]:  # a task that is not in this step
                    continue
                phi, want = max(-1.0, min(1.0, float(g @ grads[j]) / (mine * sizes[j]))), float(self.expected[i, j])
                if phi < want:
                    g += mine * (want * (1 - phi**2) ** 0.5 - phi * (1 - want**2) ** 0.5) / (sizes[j] * (1 - want**2) ** 0.5) * grads[j]
                self.expected[i, j] = (1 - self.beta) * want + self.beta * phi
            out += g
        return out

    def state_dict(self):
        return {"expected": self.expected}

    def load_state_dict(self, state):
        self.expected = state["expected"]
