"""What hooks look at: the pairs of factors A and B that train, and the blocks of the model they lie in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lorakit import host
from lorakit.errors import LorakitError
from lorakit.host import Slot
from lorakit.method import Method

_NUMBER = re.compile(r"^(.*?\.)?(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Pair:
    """Factors A (r, i) and B (o, r) of one adapter on one target, with a dimension in front where the target is a stack; the update is s B A."""

    path: str
    slot: Slot
    adapter: str
    A: nn.Parameter
    B: nn.Parameter
    s: float

    @property
    def method(self) -> Method:
        return self.slot.methods[self.adapter]

    @property
    def r(self) -> int:
        return self.A.shape[-2]

    def flipped(self) -> bool:
        """Whether the roles are swapped: on an embedding A starts at zero."""
        return self.slot.site.lookup


def pairs(model: nn.Module, what: str = "", both: bool = False, still: bool = False) -> list[Pair]:
    """The pairs of which something trains (both: both factors; still: any). LorakitError in the name of hook `what` where there are none.

    Leaves of other axes are no such factors, whatever they are called, and a pair that several targets share belongs to none of them.
    """
    out = []
    for path, slot in host.slots(model).items():
        for a, m in slot.methods.items():
            leaves = m.core.leaves
            mine = a not in slot.tied and all(k in leaves and leaves[k].axes == axes and not leaves[k].shared for k, axes in (("A", "r i"), ("B", "o r")))
            p = slot.parameters(a) if mine else {}
            if p and (still or (all if both else any)(p[k].requires_grad for k in "AB")):
                out.append(Pair(path, slot, a, p["A"], p["B"], float(getattr(slot.methods[a].core, "s", 1.0))))
    if what and not out:
        raise LorakitError(f"{what}: no adapter here has two factors A and B of each target's own that train; mend: a method like lora, or leave the hook out")
    return out


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(target's path, parameter) of every leaf that trains, each once."""
    seen: set[int] = set()
    for path, slot in host.slots(model).items():
        for a in slot.methods:
            for p in slot.parameters(a).values():
                if p.requires_grad and id(p) not in seen:
                    seen.add(id(p))
                    yield path, p


def block_of(path: str) -> str | None:
    """`model.layers.3.self_attn.q_proj` -> `model.layers.3`: the first numbered module on the way."""
    at = _NUMBER.match(path)
    return at.group(0) if at else None


def by_block(model: nn.Module, what: str) -> tuple[dict[str, list[nn.Parameter]], list[nn.Parameter]]:
    """What trains, block by block, and what trains outside of them; a tensor that several blocks share is outside."""
    places: dict[int, set[str | None]] = {}
    params: dict[int, nn.Parameter] = {}
    for path, slot in host.slots(model).items():
        for a in slot.methods:
            for p in slot.parameters(a).values():
                if p.requires_grad:
                    places.setdefault(id(p), set()).add(block_of(path))
                    params[id(p)] = p
    blocks: dict[str, list[nn.Parameter]] = {}
    rest = []
    for k, at in places.items():
        if len(at) == 1 and None not in at:
            blocks.setdefault(next(iter(at)), []).append(params[k])
        else:
            rest.append(params[k])
    if len(blocks) < 2:
        raise LorakitError(f"{what}: it chooses among the blocks of a model, and the adapter is on {len(blocks)}; mend: target more layers")
    return blocks, rest
