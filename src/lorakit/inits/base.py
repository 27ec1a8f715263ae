"""What several starts need: the weight as their factors see it, and passes over data that gather what layers see.

Hooks on modules are taken off and flags put back whatever happens. Statistics are streamed: no activation outlives its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError


def strength(method) -> float:
    """s in delta = s B A; 1 for methods that have none."""
    s = float(getattr(method, "s", 1.0))
    if s <= 0:
        raise LorakitError(f"a start made of the base's weight means nothing for a strength of {s}; mend: alpha above 0")
    return s


def seen(p: Mapping[str, Tensor], M: Tensor, times: int = 1) -> Tensor:
    """A matrix of the target's shape (o, i) as the factors see it. LorakitError if `times` r directions do not fit into it."""
    shape, r = (p["B"].shape[0], p["A"].shape[1]), p["A"].shape[0]
    M = M.float() if tuple(M.shape) == shape else M.float().mT
    if times * r > min(shape):
        raise LorakitError(f"{times * r} directions do not fit: r must be at most {min(shape) // times} for this start on a matrix of {shape[0]} x {shape[1]}, "
                           f"not {r}; mend: rank_pattern, or exclude_modules")
    return M


def unseen(W: Tensor, M: Tensor) -> Tensor:
    """A matrix that the factors see, in the target's own shape."""
    return M if M.shape == W.shape else M.mT


def quantised(what: str, W) -> Tensor:
    """The weight (o, i) from before it was quantised. LorakitError where it was not, or is not known."""
    if W.rounded is None:
        raise LorakitError(f"init {what} is for a quantised base, and this layer is not; mend: lorakit.quantize(model, …, keep=True), or base: {{quantize: …}}")
    if not W.known:
        raise LorakitError(f"init {what} needs the weight from before it was quantised, which is not known; mend: lorakit.quantize(model, …, keep=True), "
                           "or lorakit.models.load_base(path, quantize=…)")
    return W()


def put_triplets(method, p: Mapping[str, Tensor], U: Tensor, S: Tensor, V: Tensor) -> None:
    """A = sqrt(S/s) V, B = U sqrt(S/s), so that s B A = U diag(S) V."""
    root = (S / strength(method)).sqrt()
    p["A"].copy_(root[:, None] * V)
    p["B"].copy_(U * root)


def moved(batch: Any, device: torch.device) -> Any:
    if not isinstance(batch, Mapping):
        raise LorakitError(f"data: batches are dictionaries of the model's inputs, not {type(batch).__name__}")
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    was = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield next(model.parameters()).device
    finally:
        for m, flag in was.items():
            m.training = flag


def _rows(site, x: Tensor, mask: Tensor | None) -> Tensor:
    """What the canonical matrix is multiplied with, one row each, float32; a convolution's patches."""
    if site.slides:
        eye = torch.eye(site.in_, dtype=x.dtype, device=x.device).repeat(site.g, 1)
        return site.op(x, eye).movedim(site.channel, -1).reshape(-1, site.in_).float()
    if mask is not None and x.shape[:-1] == mask.shape:
        x = x[mask]
    return x.reshape(-1, site.in_).float()


@torch.no_grad()
def watch(what: str, model: nn.Module, sites: Mapping[str, Any], data: Iterable, take: Callable[[str, Tensor], None], labels: bool = False) -> None:
    """Runs the model over the data; take(path, rows) for the input of each target in each batch. labels: only tokens that have one."""
    mask: list[Tensor | None] = [None]
    count = 0

    def hook(path, site):
        def look(module, args):
            rows = _rows(site, args[0].detach(), mask[0])
            if not torch.isfinite(rows).all():
                raise LorakitError(f"{path}: init {what}: its input is not finite in batch {count}")
            take(path, rows)
        return look

    for path, site in sites.items():
        if site.lookup or site.read or site.whole:
            raise LorakitError(f"{path}: init {what} looks at the inputs of layers, and this is a table that is looked up, or a parameter that is read; mend: "
                               "leave it out of the targets")
    handles = [site.module.register_forward_pre_hook(hook(path, site)) for path, site in sites.items()]
    try:
        with evaluating(model) as device:
            for batch in data:
                batch, count = moved(batch, device), count + 1
                mask[0] = batch["attention_mask"].bool() if "attention_mask" in batch else None
                if labels and isinstance(batch.get("labels"), Tensor) and batch["labels"].dim() == 2:
                    kept = batch["labels"] != -100
                    mask[0] = kept if mask[0] is None else kept & mask[0]
                model(**batch)
    finally:
        for h in handles:
            h.remove()
    if not count:
        raise LorakitError(f"init {what}: the data holds no batch")


def gradients(what: str, model: nn.Module, sites: Mapping[str, Any], data: Iterable) -> dict[str, Tensor]:
    """The mean gradient of the loss by every target's weight, canonical, float32 on the CPU."""
    weights = {path: site.store.read() for path, site in sites.items()}
    for path, W in weights.items():
        if not W.is_floating_point() or not isinstance(W, nn.Parameter):
            raise LorakitError(f"{path}: init {what} needs the gradient of its weight, which is quantised or computed; mend: another start there")
    every = {id(W): W for W in weights.values()}
    flags, total, count = {k: W.requires_grad for k, W in every.items()}, {}, 0
    try:
        with evaluating(model) as device, torch.enable_grad():
            for W in every.values():
                W.requires_grad_(True)
            for batch in data:
                out = model(**moved(batch, device))
                loss = getattr(out, "loss", None)
                if loss is None:
                    raise LorakitError(f"init {what}: the model gives no loss for these batches; mend: put `labels` into them")
                for (k, _), g in zip(every.items(), torch.autograd.grad(loss, list(every.values()), allow_unused=True), strict=True):
                    if g is not None:
                        total[k] = total.get(k, 0) + g.to("cpu", torch.float32)
                count += 1
    finally:
        for k, W in every.items():
            W.requires_grad_(flags[k])
    if not count:
        raise LorakitError(f"init {what}: the data holds no batch")
    for path, W in weights.items():
        if id(W) not in total or not torch.isfinite(total[id(W)]).all() or not total[id(W)].any():
            raise LorakitError(f"{path}: init {what}: the loss has no gradient there, or one that is not finite; mend: leave it out of the targets")
    return {path: sites[path].view(total[id(W)] / count) for path, W in weights.items()}
