"""What rank policies look at: the rank-one components of an adapter, gated ones among them, and averages of what their entries do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import host
from lorakit.errors import LorakitError
from lorakit.host import Slot
from lorakit.method import Method
from lorakit.stores.shards import scattered


def triplet(method: Method) -> tuple[str, str, str] | None:
    """The leaves B (o, x), gate (x) and A (x, i) for one axis x, each the only one of its kind and no shared one; None where there are none."""
    axes = {k: tuple(a for a in leaf.axes.split() if a != "one") for k, leaf in method.core.leaves.items() if not leaf.shared}
    for x in dict.fromkeys(a for at in axes.values() for a in at if a not in "oi"):
        found = [[k for k, at in axes.items() if at == want] for want in (("o", x), (x,), (x, "i"))]
        if all(len(names) == 1 for names in found):
            return tuple(names[0] for names in found)
    return None


@dataclass(frozen=True)
class Gated:
    """Components gate_k b_k a_k of one adapter on one target, r on each of its matrices."""

    path: str
    slot: Slot
    adapter: str
    names: tuple[str, str, str]  # of the leaves B (o, r), gate (r) and A (r, i)
    B: nn.Parameter
    gate: nn.Parameter
    A: nn.Parameter

    @property
    def method(self) -> Method:
        return self.slot.methods[self.adapter]

    @property
    def r(self) -> int:
        return self.A.shape[-2]

    @property
    def many(self) -> int:
        """How many matrices the target has."""
        return self.gate.numel() // self.r

    def flat(self, t: Tensor) -> Tensor:
        """A tensor in the gate's shape as (matrices, r), in the same memory."""
        return t.view(self.many, self.r)

    def key(self, leaf: str) -> str:
        return f"{self.path} {self.adapter} {leaf}"


def gated(model: nn.Module, what: str, all_train: bool = True) -> list[Gated]:
    """Every adapter whose rank-one components have a gate each, which trains (all_train: and the factors too). LorakitError where there is none."""
    out = []
    for path, slot in host.slots(model).items():
        for a, m in slot.methods.items():
            names = triplet(m)
            p = slot.parameters(a) if names and a not in slot.tied else {}
            if p and all(p[k].requires_grad for k in (names if all_train else names[1:2])):
                out.append(Gated(path, slot, a, names, *(p[k] for k in names)))
    if not out:
        raise LorakitError(f"{what}: no adapter here has a trained gate for each of its rank-one components; mend: a method like adalora, sora or trilora")
    return out


def far_from_orthonormal(of: Iterable[Gated], squared: bool) -> Tensor:
    """mean(‖BᵀB - I‖, ‖A Aᵀ - I‖) over all targets, Frobenius norms."""
    norms = []
    for g in of:
        for gram in (g.B.mT @ g.B, g.A @ g.A.mT):
            d = gram - torch.eye(g.r, dtype=gram.dtype, device=gram.device)
            norms.append((d.square().sum((-2, -1)) if squared else torch.linalg.matrix_norm(d)).mean())
    return torch.stack([n.to(norms[0].device) for n in norms]).mean()


def whole_here(params: Iterable[Tensor], what: str) -> None:
    """Refuses tensors of which each process holds a part."""
    if any(scattered(p) for p in params):
        raise LorakitError(f"{what}: the adapter is spread over processes (FSDP), where its scores cannot be compared; mend: data parallelism (DDP)")


def lowest(scores: list[Tensor], n: int) -> list[Tensor]:
    """Masks in the scores' shapes, true on the n lowest of them all; of equal ones the first are lower, so that it is n exactly."""
    every = torch.cat([s.detach().flatten().float().to("cpu") for s in scores])
    mask = torch.zeros(len(every), dtype=torch.bool)
    mask[every.argsort(stable=True)[: max(n, 0)]] = True
    return [m.view(s.shape).to(s.device) for m, s in zip(mask.split([s.numel() for s in scores]), scores, strict=True)]


class Averages:
    """Of a value v for every entry of some tensors: mean := b1 mean + (1 - b1) v, spread := b2 spread + (1 - b2) |v - mean|, the new mean."""

    def __init__(self, beta1: float, beta2: float):
        self.beta1, self.beta2, self.mean, self.spread = beta1, beta2, {}, {}

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor]) -> None:
        for k, v in values.items():
            for kept in (self.mean, self.spread):
                kept[k] = kept[k].to(v.device) if k in kept else torch.zeros_like(v)
        v, mean, spread = (list(x.values()) if x is values else [x[k] for k in values] for x in (values, self.mean, self.spread))
        if v:
            torch._foreach_lerp_(mean, v, 1 - self.beta1)
            torch._foreach_lerp_(spread, torch._foreach_abs(torch._foreach_sub(v, mean)), 1 - self.beta2)

    def score(self, k: str) -> Tensor:
        return self.mean[k] * self.spread[k]

    def state_dict(self) -> dict[str, Any]:
        return {"mean": dict(self.mean), "spread": dict(self.spread)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean, self.spread = dict(state["mean"]), dict(state["spread"])


def products(params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """|p · gradient| of every entry; zero where there is no gradient."""
    return {k: torch.zeros_like(p) if p.grad is None else (p.detach() * p.grad).abs() for k, p in params.items()}


def cubic(t: int, first: int, last: int) -> float:
    """1 at step `first` and before, 0 at `last` and after, in between (1 - share of the way)³."""
    return 1.0 if t <= first else 0.0 if t >= last else (1 - (t - first) / (last - first)) ** 3


def known_total(total: int | None, what: str) -> int:
    if not total:
        raise LorakitError(f"{what}: its schedule needs to know how many steps there will be; mend: hooked(…, total=N), or a Trainer, which knows")
    return total
