"""EVA: A spans the directions in which a layer's inputs vary most; ranks go where they explain most. Paischer et al., 2024, arXiv 2410.07170.

Incremental PCA of the inputs of each target (centred, tokens that are attended to and have a label), round(rho r) components; A = the
first r' of them, rows of norm 1 (whiten: divided by the singular values), B = 0: the base is not touched.
The explained-variance ratios of all targets are pooled and the largest sum(r) of them kept: r' is how many a target has among them. A
target with none is left alone. rho 1: every target keeps r. keep_strength: alpha' = alpha r'/r. One pass over the data.
"""

import torch

from lorakit.errors import LorakitError
from lorakit.inits import init
from lorakit.inits.base import watch


class Components:
    """Centred PCA of rows that come in pieces: the mean, the variance and the first k scaled directions S V (k, i)."""

    def __init__(self, k):
        self.k, self.n, self.mean, self.square, self.SV = k, 0, 0.0, 0.0, None

    def take(self, X):
        m, mean = len(X), X.mean(0)
        shift = mean - self.mean
        lever = self.n * m / (self.n + m)
        rows = [X - mean] if self.SV is None else [self.SV, X - mean, (lever**0.5 * shift)[None]]
        self.square = self.square + (X - mean).square().sum(0) + lever * shift.square()
        self.mean, self.n = self.mean + shift * (m / (self.n + m)), self.n + m
        _, S, Vh = torch.linalg.svd(torch.cat(rows), full_matrices=False)
        self.SV = S[:self.k, None] * Vh[:self.k]

    def done(self):
        """(singular values, directions of unit length, shares of the variance)."""
        S = self.SV.norm(dim=1)
        V = self.SV / S[:, None].clamp_min(1e-30)
        sign = torch.gather(V, 1, V.abs().argmax(1, keepdim=True)).sign()
        return S, V * sign, S.square() / self.square.sum().clamp_min(1e-30)


def components(model, plan, data, options):
    pca = {path: Components(max(1, round(options["rho"] * m.core.r))) for path, (m, _) in plan.items()}

    def take(path, X):
        if len(X) >= min(pca[path].k, X.shape[1]):
            pca[path].take(X.cpu())

    watch("eva", model, {path: site for path, (_, site) in plan.items()}, data, take, labels=options["label_mask"])
    for path, c in pca.items():
        if c.SV is None:
            raise LorakitError(f"{path}: init eva: no batch has {c.k} tokens there; mend: longer or larger batches, or a smaller r")
    return {path: c.done() for path, c in pca.items()}


def redistribute(plan, found, options):
    have = {path: int((found[path][0] > 1e-6 * found[path][0][0]).sum()) for path in plan}
    if options["rho"] == 1:
        ranks = {path: m.core.r for path, m in plan.items()}
    else:
        pool = sorted(((float(share), path) for path in plan for share in found[path][2][:have[path]]), reverse=True)
        ranks = dict.fromkeys(plan, 0)
        for _, path in pool[:sum(m.core.r for m in plan.values())]:
            ranks[path] += 1
    out = {}
    for path, m in plan.items():
        r, core = ranks[path], m.core
        again = {"alpha": core.alpha * r / core.r} if options["keep_strength"] and hasattr(core, "alpha") else {}
        out[path] = None if not r else m if r == core.r else m.having(r=r, **again)
    return out


@init("eva", title="EVA", formula="A = the first principal directions of the inputs, B = 0", paper="2410.07170", collect=components, allot=redistribute)
def eva(method, p, W, gen, *, found=None, rho: float = 2.0, whiten: bool = False, label_mask: bool = True, keep_strength: bool = True):
    S, V, _ = found
    r, i = p["A"].shape
    if r > len(V) or i != V.shape[1]:
        raise LorakitError(f"init eva: r must be at most {len(V)}, the number of directions the data has there, not {r}")
    p["A"].copy_(V[:r] / S[:r, None] if whiten else V[:r])
    p["B"].zero_()
