"""What training takes into the base weight in memory, kept as factors, so that the adapter still says all of it.

    base in memory = W + s (gain B A + B0 A0)        saved: a LoRA of rank r + r0, [(1 + gain) B, B0] [A; A0], at the same s

B A is the adapter that trains, B0 A0 what earlier rounds left. The base on disk is never touched, and the change is made anew on
the untouched weight each time, in float32, so that nothing small is lost to a base in bfloat16 by rounding again and again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import host
from lorakit.errors import LorakitError
from lorakit.hooks.factors import Pair, pairs
from lorakit.hooks.surgery import draw
from lorakit.host import Slot
from lorakit.maps import each
from lorakit.method import Additive, Method, Params, Wrapper
from lorakit.methods.lora import LoRA


def lora_like(method: Method, what: str, path: str, anew: bool = True) -> None:
    """LorakitError unless what the adapter adds is s B A, whatever is put around it; anew: and can start from zero again."""
    inner = method
    while isinstance(inner, Wrapper):
        if anew and isinstance(inner, Additive):
            raise LorakitError(f"{path}: {what} starts anew from a zero update, but this adapter subtracts where it started; mend: a start that is zero")
        inner = inner.inner
    if type(inner) is not LoRA or inner.lora_bias or method.core is not inner:
        raise LorakitError(f"{path}: {what} needs an update s B A, which {inner.name} is not exactly; mend: lora, rslora or dora, without lora_bias")


@dataclass
class Wider:
    """How such an adapter is written: one LoRA that holds the rounds as well."""

    B0: Tensor  # (o, r0), without s
    A0: Tensor  # (r0, i)
    gain: float = 0.0

    def __call__(self, slot: Slot, method: Method, p: Params) -> tuple[Method, Params]:
        core = method.core
        r = core.r + self.A0.shape[-2]
        B = torch.cat([p["B"] * (1 + self.gain) if self.gain else p["B"], self.B0.to(p["B"])], -1)
        wide = LoRA(r, core.s * (r if core.scaling == "standard" else r**0.5), core.scaling)
        return method.over_core(lambda _: wide), {**p, "A": torch.cat([p["A"], self.A0.to(p["A"])], -2), "B": B}


def take(pair: Pair, B0: Tensor | None, A0: Tensor | None, gain: float = 0.0) -> None:
    """Makes the base in memory W + s (gain B A + B0 A0), from the untouched W."""
    A, B = pair.A.detach(), pair.B.detach()
    B0, A0 = (B[..., :0].clone(), A[..., :0, :].clone()) if B0 is None else (B0, A0)
    more = (torch.cat([B * gain, B0], -1), torch.cat([A, A0], -2)) if gain else (B0, A0)
    r = more[1].shape[-2]
    undo = LoRA(r, r * pair.s)
    host.absorb(pair.slot, pair.adapter, undo, {"A": more[1], "B": -more[0]}, Wider(B0, A0, gain))


def begun(pair: Pair) -> Wider | None:
    """What this target has taken in so far."""
    at = pair.slot.absorbed
    return at.written if at and at.adapter == pair.adapter and isinstance(at.written, Wider) else None


@torch.no_grad()
def new_round(chosen: list[Pair], seed: int, step: int) -> None:
    """Takes the adapters in and starts them anew, all from generators of their own."""
    for pair in chosen:
        before = begun(pair)
        B, A = pair.B.detach().clone(), pair.A.detach().clone()
        B0, A0 = (B, A) if before is None else (torch.cat([B, before.B0.to(B)], -1), torch.cat([A, before.A0.to(A)], -2))
        take(pair, B0, A0)
        host.restart(pair.slot, pair.adapter, draw(seed, step, pair.path))


def state_of(model: nn.Module) -> dict[str, Any]:
    """Target and adapter -> what it took in, with the leaves beside it, exactly."""
    out = {}
    for path, slot in host.slots(model).items():
        if slot.absorbed and isinstance(w := slot.absorbed.written, Wider):
            a = slot.absorbed.adapter
            leaves = {k: t.detach().cpu().clone() for k, t in slot.parameters(a).items()}
            out[f"{path} {a}"] = {"B0": w.B0.cpu(), "A0": w.A0.cpu(), "gain": w.gain, "leaves": leaves}
    return out


@torch.no_grad()
def load_state(model: nn.Module, state: dict[str, Any], what: str) -> None:
    """The inverse of `state_of`."""
    found = {f"{p.path} {p.adapter}": p for p in pairs(model, what, still=True)}
    for key, pair in found.items():
        host.give_back(pair.slot, pair.adapter)
        if key not in state:
            continue
        s = state[key]
        for k, t in pair.slot.parameters(pair.adapter).items():
            t.copy_(s["leaves"][k])
        take(pair, s["B0"].to(pair.B.device), s["A0"].to(pair.A.device), s["gain"])
    if lost := next((k for k in state if k not in found), None):
        raise LorakitError(f"{what}: the checkpoint holds rounds of `{lost}`, which is not here; mend: the same adapter as then")


def each_delta(pair: Pair) -> Tensor:
    """What the adapter adds to the weight, (o, i)."""
    p = {"A": pair.A.detach(), "B": pair.B.detach()}
    return each(pair.slot.site, pair.method.core, lambda q: pair.method.core.delta(q, None), p)
