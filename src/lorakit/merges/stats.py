"""What some rules must know of each adapter's data: collected with the adapter in effect, target by target.

    grams    G (i, i) = mean over tokens of x xᵀ, x the input of the target; padding left out      (RegMean, 2212.09849)
    fisher   F (o, i) = mean over examples of (∂ loss / ∂W)², the weight's own gradient              (Fisher merging, 2111.09832)

The loss is the model's own on the labels of the batch: of one example the negative log-likelihood of its answer, so that this is the
empirical Fisher information. Save what comes back with safetensors (`save_file`), and give `lorakit.mix` the file where memory is short.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import host
from lorakit.errors import LorakitError

Batches = Iterable[Mapping[str, Tensor]]


@contextmanager
def _alone(model: nn.Module, name: str) -> Iterator[dict[str, host.Slot]]:
    """Inside, this adapter alone is in effect, in evaluation mode; gives its targets that are called with activations."""
    state = host.known(model, [name])
    kept, training = state.active, model.training
    state.active = {name: 1.0}
    model.eval()
    try:
        yield {p: s for p, s in host.slots(model, name).items() if name not in s.tied and not (s.raw or s.site.lookup or s.site.slides or s.site.whole)}
    finally:
        state.active = kept
        model.train(training)


def _examples(batches: Batches, ask: str = "") -> Iterator[dict[str, Tensor]]:
    empty = True
    for batch in batches:
        if ask and ask not in batch:
            raise LorakitError(f"statistics: a batch has no `{ask}`, which the loss needs; it has {', '.join(batch)}")
        empty = False
        yield dict(batch)
    if empty:
        raise LorakitError("statistics: there is no batch to look at")


@torch.no_grad()
def grams(model: nn.Module, name: str, batches: Batches) -> dict[str, Tensor]:
    """Target -> G (i, i), float32 on the CPU. Layers that look rows up or slide have none."""
    model, total, count = host.bare(model), {}, {}
    now: dict[str, Any] = {}

    def keep(path: str):
        def hook(module, args):
            x, mask = args[0].detach(), now["batch"].get("attention_mask")
            x = x[mask.bool()] if mask is not None and mask.shape == x.shape[:-1] else x.reshape(-1, x.shape[-1])
            total[path] = total.get(path, 0) + (x.double().mT @ x.double()).cpu()
            count[path] = count.get(path, 0) + len(x)

        return hook

    with _alone(model, name) as slots:
        hooks = [s.module.register_forward_pre_hook(keep(p)) for p, s in slots.items()]
        try:
            for now["batch"] in _examples(batches):
                model(**{k: v for k, v in now["batch"].items() if k != "labels"})
        finally:
            for h in hooks:
                h.remove()
    return {p: (t / count[p]).float() for p, t in total.items()}


def fisher(model: nn.Module, name: str, batches: Batches) -> dict[str, Tensor]:
    """Target -> F (o, i), float32 on the CPU. Every row of a batch is an example of its own, so that no sum is squared."""
    model, total, count = host.bare(model), {}, 0
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(path: str):
        def hook(module, args, out):
            x = args[0].detach()
            out.register_hook(lambda g: seen.setdefault(path, []).append((x.reshape(-1, x.shape[-1]), g.detach().reshape(-1, g.shape[-1]))))

        return hook

    with _alone(model, name) as slots:
        hooks = [s.module.register_forward_hook(keep(p)) for p, s in slots.items()]
        params = [t for s in slots.values() for t in s.parameters(name).values()]
        wanted = [t.requires_grad for t in params]
        try:
            for t in params:
                t.requires_grad_(True)
            for batch in _examples(batches, "labels"):
                for n in range(len(batch["labels"])):
                    seen.clear()
                    with torch.enable_grad():
                        loss = model(**{k: v[n : n + 1] for k, v in batch.items()}).loss
                        torch.autograd.grad(loss, params, allow_unused=True)
                    count += 1
                    for p, some in seen.items():
                        G = sum(g.mT @ x for x, g in some)
                        total[p] = total.get(p, 0) + G.float().square().cpu()
        finally:
            for h in hooks:
                h.remove()
            for t, on in zip(params, wanted, strict=True):
                t.requires_grad_(on)
    return {p: t / count for p, t in total.items()}


COLLECT = {"gram": grams, "fisher": fisher}  # what a rule `needs` -> how it is found
