"""Acting with a Kronecker product that is never formed, and of which nothing is kept for the backward pass but the input and the factors.

    x (W1 ⊗ W2)ᵀ is W1 X W2ᵀ for each row of x as a matrix X (m, n):      (…, m n) -> (…, l k), W1 (l, m), W2 (k, n)

W2 may be given as two factors, (k, r) and (r, n). W1 acts before, between or after them, where that costs least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.kernels.dropout import steady


def kronecker_slow(x: Tensor, W1: Tensor, *W2: Tensor) -> Tensor:
    return F.linear(x, torch.kron(W1, W2[0] if len(W2) == 1 else W2[0] @ W2[1]))


def place(W1: Tensor, W2: Sequence[Tensor]) -> int:
    """After how many factors of W2, from its right, W1 costs least."""
    l, m = W1.shape
    sizes = [W2[-1].shape[1], *(A.shape[0] for A in reversed(W2))]
    steps = [a * b for a, b in pairwise(sizes)]
    costs = [m * sum(steps[:k]) + l * m * size + l * sum(steps[k:]) for k, size in enumerate(sizes)]
    return costs.index(min(costs))


def _order(at: int, W1: Tensor, W2: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The factors as they act one after the other, that number `at` on the other dimension than the rest."""
    first = [A.to(dtype) for A in reversed(W2)]
    return [*first[:at], W1.to(dtype), *first[at:]]


def _turned(h: Tensor, k: int, at: int) -> Tensor:
    """h with the dimension last that factor k acts on, as the one before it left h."""
    return h.mT.contiguous() if k in (at, at + 1) else h


def _act(x: Tensor, at: int, W1: Tensor, *W2: Tensor) -> Tensor:
    factors, h = _order(at, W1, W2, x.dtype), x.unflatten(-1, (W1.shape[1], -1))
    for k, A in enumerate(factors):
        h = F.linear(_turned(h, k, at), A)
    return _turned(h, len(factors), at).flatten(-2)


class _Kronecker(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(at, mask, x, W1, *W2):
        return _act(mask(x), at, W1, *W2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.at, ctx.mask, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, g):
        (x, *own), at = ctx.saved_tensors, ctx.at
        factors = _order(at, own[0], own[1:], g.dtype)
        seen = [_turned(ctx.mask(x).to(g.dtype).unflatten(-1, (own[0].shape[1], -1)), 0, at)]  # what each factor acted on
        for k, A in enumerate(factors[:-1], 1):
            seen.append(_turned(F.linear(seen[-1], A), k, at))
        g, grads = _turned(g.unflatten(-1, (len(own[0]), -1)), len(factors), at), []
        for k, A in reversed([*enumerate(factors)]):
            grads.append(g.reshape(-1, A.shape[0]).mT @ seen[k].reshape(-1, A.shape[1]))
            g = _turned(g @ A, k, at)
        one = grads.pop(len(factors) - 1 - at)
        return None, None, ctx.mask(g.flatten(-2)).to(x.dtype), *(d.to(A.dtype) for d, A in zip([one, *grads], own, strict=True))


def kronecker(x: Tensor, W1: Tensor, *W2: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
    at = place(W1, W2)
    return _act(drop(x), at, W1, *W2) if torch.compiler.is_compiling() else _Kronecker.apply(at, steady(drop, x), x, W1, *W2)
