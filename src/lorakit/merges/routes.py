"""Merging into a quantised base. A small update is lost by rounding: codes are the nearest to base + update, mostly the base's own.

    dequantized   the layer becomes an ordinary one that holds base + update: what was trained, at the size of the compute dtype
    requantize    q(base + update): the size of the base; refused where it keeps less of the update than `least`; all is kept of an adapter that was trained
                  so (`merge_aware`)
    exact         an update that is constant over the base's groups goes into their zero points: nothing is lost (QA-LoRA, 2309.14717)
    residual      q(base + update), and what rounding dropped as a plain LoRA beside it, of the lowest rank with a relative `error`

Kept share of an update Δ: <q(W + Δ) - W, Δ> / |Δ|².
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit import host
from lorakit.errors import LorakitError, near
from lorakit.maps import Applied
from lorakit.merges.mix import put

LEAST = 0.9


@dataclass(frozen=True)
class Kept:
    """What a merge kept on one target."""

    share: float  # of the update, 1 is all
    error: float  # |result - (base + update)| / |update|
    rank: int = 0  # of the LoRA beside it
    changed: bool = True  # the base's codes are others


def _share(now: Tensor, W: Tensor, V: Tensor) -> tuple[float, float]:
    D, got = (V - W).double(), (now - W).double()
    size = float(D.square().sum())
    return (float((got * D).sum()) / size, float((got - D).norm()) / size**0.5) if size else (1.0, 0.0)


def _read(slot: host.Slot) -> Tensor:
    return slot.site.view(slot.site.store.read(torch.float32))


def _unrounded(slot: host.Slot, V: Tensor) -> Tensor:
    """What the store is to round: V, or of an adapter that was trained with the rounding what it was made of, so that even the constants are the same."""
    m = slot.map(slot.state.active)
    return m.method.unrounded(m.p, m.inner.weight()) if isinstance(m, Applied) and m.gain == 1.0 else V


def requantize(model: nn.Module, least: float = LEAST, force: bool = False) -> dict[str, Kept]:
    """q(base + update) on every quantised target. LorakitError, and nothing merged, where less than `least` of an update would be left."""
    told: dict[str, Kept] = {}

    def write(slot: host.Slot, V: Tensor) -> None:
        if not slot.site.store.packs:
            host.thaw(slot, V)
            return
        W = _read(slot)
        slot.site.store.write(slot.site.unview(_unrounded(slot, V)))
        share, error = _share(_read(slot), W, V)
        told[slot.path] = Kept(share, error)
        if share < least and not force:
            name = slot.site.module.scheme.name
            raise LorakitError(f"{slot.path}: rounding to {name} would keep {share:.1%} of the update, less than {least:.0%}; nothing was merged. Mend: "
                               "route dequantized (a larger model) or residual (a LoRA beside it), merge_aware: true in training, more bits, or force")

    host.merge(model, write)
    return told


def exact(model: nn.Module) -> dict[str, Kept]:
    """The update into the zero points. LorakitError, and nothing merged, where it is not constant over the base's groups."""
    told: dict[str, Kept] = {}

    def write(slot: host.Slot, V: Tensor) -> None:
        if not slot.site.store.packs:
            host.thaw(slot, V)
            return
        W, store = _read(slot), slot.site.store
        store.shift(V - W)
        told[slot.path] = Kept(*_share(_read(slot), W, V))

    host.merge(model, write)
    return told


def residual(model: nn.Module, error: float = 0.05, name: str = "residual") -> dict[str, Kept]:
    """Merges for good: q(base + update) where the remainder has a lower rank than the update, else the base as it is; the rest becomes adapter `name`."""
    if not 0 < error < 1:
        raise LorakitError(f"residual: the error must be between 0 and 1, not {error}")
    told: dict[str, Kept] = {}
    rest: dict[str, tuple[Tensor, Tensor]] = {}

    def write(slot: host.Slot, V: Tensor) -> None:
        if not slot.site.store.packs:
            host.thaw(slot, V)
            return
        site, W, whole = slot.site, _read(slot), _unrounded(slot, V)
        goal = error * float((V - W).norm())
        options = [(V - W, False), (V - site.rounded(whole), True)]
        ranks = [(_rank(D, goal), changed, D) for D, changed in options]
        r, changed, D = min(ranks, key=lambda t: t[0])
        if changed:
            site.store.write(site.unview(whole))
        U, S, Vh = torch.linalg.svd(D.double(), full_matrices=False)
        if r:
            rest[slot.path] = (U[:, :r] * S[:r]).to(V.dtype), Vh[:r].to(V.dtype)
        left = D.double() - (U[:, :r] * S[:r]) @ Vh[:r]
        told[slot.path] = Kept(*_share(V - left.to(V.dtype), W, V), r, changed)

    host.merge(model, write)
    host.unload(model)
    if rest:
        put(model, name, rest, tie=False, dropout=0.0)
        host.state_of(model).active = {name: 1.0}
    return told


def _rank(D: Tensor, goal: float) -> int:
    """The lowest rank at which what is left of D is no more than the goal (Frobenius)."""
    S = torch.linalg.svdvals(D.double())
    tails = S.square().flip(0).cumsum(0).flip(0).sqrt()
    return int((tails > goal).sum())


def dequantized(model: nn.Module) -> dict[str, Kept]:
    """base + update as an ordinary layer."""
    host.merge(model)
    return {}


ROUTES: dict[str, Callable[..., dict[str, Kept]]] = {"dequantized": dequantized, "requantize": requantize, "exact": exact, "residual": residual}


def route(name: str) -> Callable[..., dict[str, Kept]]:
    """A route by its name. LorakitError with the nearest."""
    if name not in ROUTES:
        raise LorakitError(f"merge: unknown route `{name}`{near(name, ROUTES)}")
    return ROUTES[name]
