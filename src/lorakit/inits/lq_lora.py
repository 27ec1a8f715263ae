"""LQ-LoRA: low rank plus quantised, factored first. Guo et al., 2023, arXiv 2311.12023.

Q_0 = 0;  L_t = the best rank-r approximation of W - Q_(t-1),  Q_t = q(W - L_t), until |W - Q_t - L_t| grows; the last pair before that is kept
(the official code keeps the one that grew). base := Q, s B A := L.

lq-lora-fisher weighs every entry by how much the loss feels it. F = Σ over rows of data of the squared gradient by W, c = sqrt of its means over each
row (o), d over each column (i): L_t = diag(c)⁻¹ SVD_r(diag(c) (W - Q_(t-1)) diag(d)) diag(d)⁻¹, the least |sqrt(F) ∘ (W - Q - L)| where F = c² (d²)ᵀ up to
a factor, and the norm that must not grow is |diag(c) (W - Q - L) diag(d)|. The gradients are those of the model as it is, on its quantised base (the
official code takes them before). c and d are kept above 1e-3 of their largest, since what has no gradient would be divided by zero.

The bits of every matrix are chosen apart: `lorakit.quantized.bits.allot`.
"""

import torch

from lorakit.errors import LorakitError
from lorakit.inits import init
from lorakit.inits.base import evaluating, moved, put_triplets, quantised, seen, unseen
from lorakit.kernels.svd import fast_svd, thin_svd
from lorakit.method import Origin

FLOOR = 1e-3


def fisher(model, targets, data, options):
    """Path -> (c (o,), d (i,)), square roots of the Fisher information's means. Each row of the data is a sample."""
    sites, what = {p: site for p, (_, site) in targets.items()}, "lq-lora-fisher"
    for path, site in sites.items():
        if site.lookup or site.slides or site.read or site.whole:
            raise LorakitError(f"{path}: init {what} is for linear layers; mend: leave it out of the targets, or init: lq-lora")
        store = site.store
        quantised(what, Origin(lambda: None, rounded=store.rounded if store.packs else None, known=not store.packs or store.original() is not None))
    totals, inputs, touched, count = {}, {}, {}, 0

    def hook(path):
        def look(module, args, y):
            inputs[path] = args[0].detach().flatten(0, -2).float()
            touched[path] = torch.zeros_like(y, requires_grad=True)  # its gradient is the output's
            return y + touched[path]
        return look

    handles = [site.module.register_forward_hook(hook(path)) for path, site in sites.items()]
    try:
        with evaluating(model) as device, torch.enable_grad():
            for batch in data:
                batch = moved(batch, device)
                for k in range(len(next(t for t in batch.values() if isinstance(t, torch.Tensor)))):
                    loss = getattr(model(**{n: t[k : k + 1] if isinstance(t, torch.Tensor) else t for n, t in batch.items()}), "loss", None)
                    if loss is None:
                        raise LorakitError(f"init {what}: the model gives no loss for these batches; mend: put `labels` into them")
                    for path, g in zip(touched, torch.autograd.grad(loss, list(touched.values()), allow_unused=True), strict=True):
                        if g is not None:
                            F = (g.flatten(0, -2).float().mT @ inputs[path]).double().square().cpu()
                            c, d = totals.get(path, (0.0, 0.0))
                            totals[path] = c + F.mean(1), d + F.mean(0)
                    count += 1
    finally:
        for h in handles:
            h.remove()
    if not count:
        raise LorakitError(f"init {what}: the data holds no row")
    for path in sites:
        if path not in totals or not torch.isfinite(totals[path][0]).all() or not totals[path][0].any():
            raise LorakitError(f"{path}: init {what}: the loss has no gradient there, or one that is not finite; mend: leave it out of the targets")
    return {path: tuple(_floored(t.sqrt().float()) for t in both) for path, both in totals.items()}


def _floored(v):
    return v.clamp_min(FLOOR * v.max())


def decomposed(method, p, whole, rounded, gen, steps, niter, c, d):
    """Sets A and B to the factors of L, and returns W - L, of the last pair that came nearer; c (o,) and d (i,) weigh rows and columns."""
    r, weigh = p["A"].shape[0], c[:, None] * d
    Q, best = torch.zeros_like(whole), None
    for _ in range(max(steps, 1)):
        gap = seen(p, (whole - Q) * weigh)
        U, S, Vh = fast_svd(gap, r, niter, gen) if niter else thin_svd(gap)
        L = unseen(whole, (U[:, :r] * S[:r]) @ Vh[:r]) / weigh
        Q = rounded(whole - L)
        error = float(((whole - Q - L) * weigh).norm())
        if best is not None and error >= best[0]:
            break
        best = error, (U[:, :r], S[:r], Vh[:r]), whole - L
    U, S, Vh = best[1]
    c, d = (c, d) if len(c) == len(U) else (d, c)  # as the factors see them
    put_triplets(method, p, U / c[:, None], S, Vh / d)
    return best[2]


@init("lq-lora", title="LQ-LoRA", formula="L = s B A = SVD_r(W - Q), Q = q(W - L), until it gets no better", paper="2311.12023", nonzero=True, joint=True)
def lq_lora(method, p, W, gen, *, steps: int = 20, niter: int = 0):
    whole = quantised("lq-lora", W)
    return decomposed(method, p, whole, W.rounded, gen, steps, niter, *(torch.ones(n) for n in whole.shape))


@init("lq-lora-fisher", title="LQ-LoRA, weighted by the Fisher information", formula="L = s B A = C⁻¹ SVD_r(C (W - Q) D) D⁻¹, Q = q(W - L)",
      paper="2311.12023", nonzero=True, joint=True, collect=fisher)
def lq_lora_fisher(method, p, W, gen, *, found, steps: int = 20, niter: int = 0):
    return decomposed(method, p, quantised("lq-lora-fisher", W), W.rounded, gen, steps, niter, *found)
