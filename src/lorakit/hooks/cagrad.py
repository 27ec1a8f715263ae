"""CAGrad: the step near the mean gradient that helps the worst task most. Liu et al., 2021, arXiv 2110.14048.

    g0 = mean of g_i;   w = argmin over the simplex of  g_w · g0 + c |g0| |g_w|,   g_w = Σ w_i g_i;    d = g0 + (c |g0| / |g_w|) g_w

|d - g0| = c |g0|. The problem in w is solved on the tasks' inner products, so its cost does not grow with the model. The step taken is
tasks · d (divided by 1 + c² with rescale), as large as the sum of the losses gives without the hook. How the tasks are given: see `pcgrad`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.hooks.base import hook
from lorakit.hooks.pcgrad import Tasks


def worst_case(gram: Tensor, c: float) -> Tensor:
    """The weights w, from the inner products of the tasks' gradients."""
    n = len(gram)
    mean = gram.mean(1)
    size = float(gram.mean().clamp_min(0)) ** 0.5
    logits = torch.zeros(n, dtype=gram.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=1e-14)
    unit = float(gram.diagonal().max()) or 1.0

    def closure():
        optimizer.zero_grad()
        w = logits.softmax(0)
        value = (w @ mean + c * size * (w @ gram @ w).clamp_min(1e-30).sqrt()) / unit
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    return logits.detach().softmax(0)


@hook("cagrad", "CAGrad", "2110.14048", "g0 + c |g0| g_w / |g_w|")
class CAGrad(Tasks):
    tasks: int = 2  # how many tasks there are
    c: float = 0.4  # how far from the mean gradient; 0: the mean itself; 0.4 to 0.5 are usual
    rescale: bool = False  # divide by 1 + c²

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.c < 1:
            raise LorakitError(f"cagrad: c must be at least 0 and below 1, not {self.c}")

    def combine(self, model, grads):
        g0 = grads.mean(0)
        w = worst_case((grads @ grads.T).double().cpu(), self.c).to(grads)
        g = w @ grads
        size = g.norm()
        d = g0 + self.c * g0.norm() / size * g if size > 0 else g0
        return d * (self.tasks / (1 + self.c**2) if self.rescale else self.tasks)
