"""Many adapters trained at once on one frozen base: the base's products are done once for all, each adapter sees only its own rows.

    together(model, {"a": batches_a, "b": batches_b}, steps=100, learning_rate={"a": 1e-3, "b": 3e-3})

The loss is the sum of each adapter's mean over its own tokens, gradients are clipped and rates scheduled for each alone, so every adapter ends where a
run of its own would have ended, but for rounding. Ranks, rates and methods may differ; where all of a layer's adapters add one thin product their
work is one batched product (`lorakit.kernels.segments`), else a loop over adapters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit import api, host
from lorakit.errors import LorakitError, near
from lorakit.prompts import Prompted

Batches = Iterable[Mapping[str, Tensor]]


def together(model: nn.Module, batches: Mapping[str, Batches], *, steps: int, learning_rate: float | Mapping[str, float] = 2e-4, weight_decay: float = 0.0,
             max_grad_norm: float = 1.0, schedule: str = "linear", pad: int = 0) -> dict[str, list[float]]:
    """Trains the adapters that `batches` names, each on its own, for so many steps of AdamW; returns name -> loss at each step.

    batches: input_ids, labels (-100: no loss) and, where rows are padded, attention_mask; begun again when they end. schedule: linear (to zero) or
    constant. max_grad_norm 0: no clipping. LorakitError for an unknown adapter or rate, no rows, adapters that share
    tensors, a method with a loss of its own, and a text's first label behind learnt tokens, which predict it where such an adapter is trained alone.
    """
    state = host.known(model, batches)
    rates = learning_rate if isinstance(learning_rate, Mapping) else dict.fromkeys(batches, learning_rate)
    for name in (*batches, *rates):
        if name not in rates or name not in batches:
            raise LorakitError(f"together: `{name}` has {'no learning rate' if name in batches else 'no batches'}{near(name, [*batches, *rates])}")
    if schedule not in ("linear", "constant"):
        raise LorakitError(f"together: unknown schedule `{schedule}`{near(schedule, ('linear', 'constant'))}")
    own = {name: _own(model, name) for name in batches}
    for name, params in own.items():
        if other := next((n for n, p in own.items() if n != name and {id(t) for t in p} & {id(t) for t in params}), None):
            raise LorakitError(f"together: `{name}` and `{other}` share tensors, so they cannot be trained apart; mend: two runs")
    prompts = {n: [m for slot in host.slots(model, n).values() if isinstance(m := slot.methods[n], Prompted)] for n in batches}
    for name, methods in prompts.items():
        if other := next((m for m in methods if type(m).told is not Prompted.told), None):
            raise LorakitError(f"together: `{name}` has a loss of its own ({other.name}), which is not taken here; mend: a run of its own")
    front = [n for n, methods in prompts.items() if any(m.in_front for m in methods)]
    feeds = {name: _again(name, rows) for name, rows in batches.items()}
    losses: dict[str, list[float]] = {name: [] for name in batches}
    keep, was, optimizer = state.active, model.training, None
    model.train()
    try:
        for step in range(steps):
            joined, names = _joined({n: next(f) for n, f in feeds.items()}, pad)
            _refuse(joined["labels"], names, front)
            with api.rows(model, names):  # also while checkpoints are computed again
                each = _losses(model, joined, names, list(batches))
                each.sum().backward()
            if optimizer is None:
                groups = [{"params": _long(own[n]), "lr": rates[n]} for n in batches]
                optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
            for group, (name, loss) in zip(optimizer.param_groups, zip(batches, each.detach().tolist(), strict=True), strict=True):
                losses[name].append(loss)
                group["lr"] = rates[name] * (1 - step / steps if schedule == "linear" else 1)
                if max_grad_norm:
                    nn.utils.clip_grad_norm_(group["params"], max_grad_norm, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    finally:
        for p in itertools.chain(*own.values()):
            p.data, p.grad = p.data.clone(), None
        state.active = keep
        model.train(was)
    return losses


def _own(model: nn.Module, name: str) -> list[nn.Parameter]:
    found = [t for slot in host.slots(model, name).values() for t in slot.parameters(name).values() if t.requires_grad]
    if not found:
        raise LorakitError(f"together: nothing of adapter `{name}` trains; mend: lorakit.load(…, trainable=True)")
    return list({id(t): t for t in found}.values())


def _long(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """The same as few long parameters, of which those that have a gradient become parts: a step of an optimiser costs by the tensor."""
    kinds: dict[tuple, list[nn.Parameter]] = {}
    for p in params:
        if p.grad is not None:
            kinds.setdefault((p.device, p.dtype), []).append(p)
    out = [p for p in params if p.grad is None]
    for some in kinds.values():
        whole = nn.Parameter(torch.cat([p.detach().flatten() for p in some]))
        whole.grad = torch.cat([p.grad.flatten() for p in some])
        sizes = [p.numel() for p in some]
        for p, w, g in zip(some, whole.data.split(sizes), whole.grad.split(sizes), strict=True):
            p.data, p.grad = w.view_as(p), g.view_as(p)
        out.append(whole)
    return out


def _again(name: str, rows: Batches) -> Iterator[Mapping[str, Tensor]]:
    while True:
        some = False
        for batch in rows:
            some = True
            yield batch
        if not some:
            raise LorakitError(f"together: adapter `{name}` has no batch (left); mend: a list or a loader, which can be read again")


def _joined(batches: Mapping[str, Mapping[str, Tensor]], pad: int) -> tuple[dict[str, Tensor], list[str]]:
    """One batch of all rows, padded to one length, and the adapter of each row."""
    longest = max(b["input_ids"].shape[1] for b in batches.values())

    def wide(t: Tensor, fill: int) -> Tensor:
        return F.pad(t, (0, longest - t.shape[1]), value=fill)

    out = {"input_ids": torch.cat([wide(b["input_ids"], pad) for b in batches.values()]),
           "labels": torch.cat([wide(b["labels"], -100) for b in batches.values()])}
    masks = [b.get("attention_mask", torch.ones_like(b["input_ids"])) for b in batches.values()]
    mask = torch.cat([wide(m, 0) for m in masks])
    return out if bool(mask.all()) else out | {"attention_mask": mask}, [n for n, b in batches.items() for _ in range(len(b["input_ids"]))]


def _refuse(labels: Tensor, names: list[str], front: list[str]) -> None:
    for name, label in zip(names, labels[:, 0].tolist(), strict=True):
        if name in front and label != -100:
            raise LorakitError(f"together: the last learnt token of `{name}` would predict a text's first one, which counts in a run of its own and not here; "
                               "mend: label -100 for the first token of each row, or a run of its own")


def _losses(model: nn.Module, batch: Mapping[str, Tensor], names: list[str], order: list[str]) -> Tensor:
    """(adapters,): each one's mean over its own tokens."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs).logits
    labels = batch["labels"][:, 1:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=-100).view(labels.shape).sum(1)
    index = torch.tensor([order.index(n) for n in names], device=loss.device)
    total = loss.new_zeros(len(order)).index_add(0, index, loss)
    count = loss.new_zeros(len(order)).index_add(0, index, (labels != -100).sum(1).to(loss.dtype))
    return total / count.clamp_min(1)
