"""Ranks per layer before training starts: a ladder over depth, and by importance. Both give a `rank_pattern`.

    ladder (PRILoRA, 2401.11316):   r_l = floor(first + (last - first) l / (L - 1) + 1/2),   l = 0 … L - 1
    importance:                     r_m = min(cap, floor(base (1 + I_m / max I) + 1/2))

With alpha / r as the scale, alpha has to be given for each rank (`alpha_pattern`) if all layers are to have the same scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import host
from lorakit.errors import LorakitError
from lorakit.hooks.factors import block_of
from lorakit.hooks.rounds import lora_like
from lorakit.hooks.surgery import draw
from lorakit.methods.tied_lora import TiedLoRA
from lorakit.spec import Spec
from lorakit.targets import select

Targets = str | Sequence[str]


def ladder(n: int, first: float, last: float) -> list[int]:
    """Ranks of n layers, rounded half up: 4 to 12 over 12 layers keeps the mean of 8."""
    return [math.floor(first + (last - first) * k / max(n - 1, 1) + 0.5) for k in range(n)]


def rank_ladder(model: nn.Module, first: int = 4, last: int = 12, targets: Targets = "all-linear") -> dict[str, int]:
    """A rank_pattern that grows with depth; what lies in no numbered block is left out and has the rank r."""
    if first < 1 or last < 1:
        raise LorakitError(f"rank_ladder: ranks are at least 1, not {first} and {last}")
    at = {p: block_of(p) for p in select(model, targets)}
    blocks = list(dict.fromkeys(b for b in at.values() if b is not None))
    if len(blocks) < 2:
        raise LorakitError(f"rank_ladder: the targets lie in {len(blocks)} numbered blocks, and a ladder needs two; mend: other targets, or one rank for all")
    of = dict(zip(blocks, ladder(len(blocks), first, last), strict=True))
    return {f"^{p}": of[b] for p, b in at.items() if b is not None}


def rank_by_importance(importance: Mapping[str, float], base: int = 8, cap: int = 16) -> dict[str, int]:
    """A rank_pattern: the most important target has twice the base rank, at most `cap`, one of no importance the base rank."""
    if not 1 <= base <= cap:
        raise LorakitError(f"rank_by_importance: base is at least 1 and at most cap, not {base} and {cap}")
    bad = next((p for p, v in importance.items() if not 0 <= v < math.inf), None)
    if bad is not None:
        raise LorakitError(f"rank_by_importance: {bad} has the importance {importance[bad]}; it must be a number of at least 0")
    top = max(importance.values(), default=0.0) or 1.0
    return {f"^{p}": min(cap, math.floor(base * (1 + v / top) + 0.5)) for p, v in importance.items()}


def importance(model: nn.Module, batches: Iterable[Any], by: str = "gradient", targets: Targets = "all-linear",
               loss: Callable[[nn.Module, Any], Tensor] | None = None) -> dict[str, float]:
    """Target -> importance on a few batches, without adapters: ‖∂L/∂W‖ of the summed loss, or the root mean square of the layer's input.

    by: "gradient" or "activation". loss: of model and batch; without one, a batch is what the model is called with and its `.loss` counts.
    """
    if by not in ("gradient", "activation"):
        raise LorakitError(f"importance: by is gradient or activation, not {by!r}")
    layers = {p: model.get_submodule(p) for p in select(model, targets)}
    loss = loss or (lambda m, b: m(**b).loss)
    sums, counts, was = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0), {p: p.requires_grad for p in model.parameters()}
    train = model.training

    def note(path):
        def saw(module, args):
            sums[path] += float(args[0].detach().float().square().sum())
            counts[path] += args[0].numel()
        return saw

    handles = [m.register_forward_pre_hook(note(p)) for p, m in layers.items()] if by == "activation" else []
    weights = {p: m.weight for p, m in layers.items()}
    grads: dict[str, Tensor] = {}
    try:
        model.eval()
        for p in was:
            p.requires_grad_(by == "gradient" and any(p is w for w in weights.values()))
        for batch in batches:
            with torch.set_grad_enabled(by == "gradient"):
                value = loss(model, batch)
            if by == "gradient":
                for path, g in zip(weights, torch.autograd.grad(value, list(weights.values())), strict=True):
                    grads[path] = grads[path] + g.float() if path in grads else g.float()
    finally:
        for h in handles:
            h.remove()
        for p, r in was.items():
            p.requires_grad_(r)
        model.train(train)
    if by == "gradient":
        return {p: float(g.norm()) for p, g in grads.items()}
    return {p: math.sqrt(sums[p] / max(counts[p], 1)) for p in layers}


@torch.no_grad()
def lora_drop(model: nn.Module, batches: Iterable[Mapping[str, Any]], threshold: float = 0.9, scope: str = "name",
              adapter: str = "default") -> dict[str, Any]:
    """LoRA-drop (2402.07721): which targets keep an adapter of their own and which share one, after a first short training on a sample.

        g_m = Σ_x ‖ΔW_m x‖² = Σ u (BᵀB) uᵀ, u = x Aᵀ,   I_m = g_m / Σ g;   the smallest set with Σ I ≥ threshold keeps its own

    x are the target's inputs in the adapted model, without dropout and padding. scope: "name", separately for targets of one name and
    shape, or "shape". Returns {"importance", "keep": [path], "share": [[paths of one shape], …]}; a group of one keeps its own.
    """
    if not 0 < threshold <= 1 or scope not in ("name", "shape"):
        raise LorakitError(f"lora_drop: threshold is above 0 and at most 1 and scope name or shape, not {threshold!r}, {scope!r}")
    slots, g = {p: s for p, s in host.slots(model, adapter).items() if adapter not in s.tied}, {}
    mask: list[Tensor | None] = [None]

    def note(path, B, A):
        gram = B.mT @ B

        def saw(module, args):
            u = args[0].float() @ A.mT
            each = ((u @ gram) * u).sum(-1)
            g[path] += float((each * mask[0] if mask[0] is not None and mask[0].shape == each.shape else each).sum())
        return saw

    handles, train = [], model.training
    try:
        for path, slot in slots.items():
            two = None if slot.site.stack or slot.site.read or slot.site.lookup or slot.site.slides else slot.methods[adapter].two(slot.params(adapter))
            if two is None:
                raise LorakitError(f"lora_drop: {path} is no linear layer with a product of two factors on it; mend: leave it out of the targets, or lora")
            g[path] = 0.0
            handles.append(slot.module.register_forward_pre_hook(note(path, *(t.float() for t in two))))
        model.eval()
        for batch in batches:
            mask[0] = batch.get("attention_mask")
            model(**batch)
    finally:
        for h in handles:
            h.remove()
        model.train(train)
    groups: dict[tuple, list[str]] = {}
    for path, slot in slots.items():
        groups.setdefault((slot.site.out, slot.site.in_, path.rpartition(".")[2] if scope == "name" else ""), []).append(path)
    out: dict[str, Any] = {"importance": {}, "keep": [], "share": []}
    for paths in groups.values():
        total = sum(g[p] for p in paths)
        if not total:
            raise LorakitError(f"lora_drop: the adapters of {paths[0]} and its like add nothing yet, so none stands out; mend: train a few steps first")
        out["importance"] |= {p: g[p] / total for p in paths}
        order, reached = sorted(paths, key=lambda p: -g[p]), 0.0
        own = []
        while (not own or reached < threshold - 1e-9) and len(own) < len(order) and g[order[len(own)]]:
            reached += g[order[len(own)]] / total
            own.append(order[len(own)])
        rest = [p for p in paths if p not in own]
        out["keep"] += own + (rest if len(rest) == 1 else [])
        out["share"] += [rest] if len(rest) > 1 else []
    return out


def stratified(kinds: Sequence[Any], share: float = 0.1, seed: int = 0) -> list[int]:
    """Places of a sample that holds the share of every kind (at least one of each), in order: LoRA-drop's sample of the training rows, by their label."""
    if not 0 < share <= 1:
        raise LorakitError(f"stratified: share is above 0 and at most 1, not {share!r}")
    places: dict[str, list[int]] = {}
    for n, kind in enumerate(kinds):
        places.setdefault(str(kind), []).append(n)
    out: list[int] = []
    for kind, at in places.items():
        order = torch.randperm(len(at), generator=draw(seed, 0, f"stratified {kind}")).tolist()
        out += [at[k] for k in order[: max(1, round(share * len(at)))]]
    return sorted(out)


def lora_drop_spec(model: nn.Module, plan: Mapping[str, Any], adapter: str = "default") -> Spec:
    """LoRA-drop's second phase from what `lora_drop` found: a Spec whose `keep` targets have factors of their own and whose `share` ones share a pair.

        first = adapt(base, "lora", r=8);  a few steps on rows[stratified(labels)];  spec = lora_drop_spec(first, lora_drop(first, batches))
        adapt(base_anew, spec);  the training proper, from the start

    W' = W + s B A as in the first adapter, with its targets, dropout and seed; a shared gradient is the sum over the targets. LorakitError unless the
    first adapter is a LoRA of one rank and strength.
    """
    specs, slots = host.known(model, [adapter]).specs, host.slots(model, adapter)
    mine = [*plan["keep"], *(p for group in plan["share"] for p in group)]
    if missing := next((p for p in mine if p not in slots), None):
        raise LorakitError(f"lora_drop: the plan names {missing}, which has no adapter `{adapter}`; mend: the plan of this very model")
    for p in mine:
        lora_like(slots[p].methods[adapter], "lora_drop", p, anew=False)
    cores = {(slots[p].methods[adapter].core.r, slots[p].methods[adapter].core.s) for p in mine}
    if len(cores) > 1:
        raise LorakitError("lora_drop: targets of several ranks or strengths cannot share their factors; mend: a first adapter without rank_pattern and "
                           "alpha_pattern")
    (r, s), first = cores.pop(), specs[adapter]
    how = "shape" if any(len({p.rpartition(".")[2] for p in group}) > 1 for group in plan["share"]) else "name"
    tied = TiedLoRA(r, s * r, how, train_u=False, train_v=False)
    return replace(first, method=first.method.over_core(lambda _: tied), init=None, init_options={}, rank_pattern={}, alpha_pattern={}, recipe="",
                   patterns={"share": {f"^{p}": "none" for p in plan["keep"]}})
