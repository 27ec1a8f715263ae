"""The two residual branches of a model's blocks: attention and feed-forward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lorakit import host
from lorakit.errors import LorakitError

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


@dataclass(frozen=True)
class Branch:
    path: str
    module: nn.Module
    kind: str  # attention or mlp


def branches(model: nn.Module, what: str) -> list[Branch]:
    """Attention and feed-forward of every block that has both as children, in order. LorakitError where there is none."""
    out = []
    for path, block in host.walk(model):
        names = [next((n for n in kind if n in block._modules), None) for kind in (ATTENTION, FEED_FORWARD)]
        if all(names) and path.rpartition(".")[2].isdigit():
            out += [Branch(f"{path}.{n}", block._modules[n], kind) for n, kind in zip(names, ("attention", "mlp"), strict=True)]
    if not out:
        raise LorakitError(f"{what}: this {type(model).__name__} has no blocks with an attention and a feed-forward part added to what comes in "
                           f"(children called {', '.join(ATTENTION)} and {', '.join(FEED_FORWARD)}); mend: leave the hook out")
    return out
