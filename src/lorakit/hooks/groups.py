"""Heads and channels of a model's blocks as groups of rows and columns of its layers: what structured pruning takes away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit import api
from lorakit.errors import LorakitError
from lorakit.hooks.factors import Pair, pairs

HEADS, CHANNELS = "heads", "channels"
MAKES = {"q_proj": HEADS, "k_proj": HEADS, "v_proj": HEADS, "gate_proj": CHANNELS, "up_proj": CHANNELS, "fc1": CHANNELS}  # their rows belong to groups
TAKES = {"o_proj": HEADS, "out_proj": HEADS, "down_proj": CHANNELS, "fc2": CHANNELS}  # their columns do
DECIDES = {HEADS: ("v_proj",), CHANNELS: ("gate_proj", "up_proj", "fc1")}  # without the output of one of these a group adds nothing


@dataclass(frozen=True)
class Block:
    """The heads of one attention or the channels of one feed-forward part: n groups, equal parts of the rows or columns of its layers."""

    path: str  # of the module that holds the layers
    kind: str
    n: int
    layers: Mapping[str, Pair]  # those that are adapted, by their own names

    @property
    def key(self) -> str:
        return f"{self.path} {self.kind}"

    @property
    def masks(self) -> list[Tensor]:
        """(n, width) of every layer whose outputs are masked, in the leaves' own memory."""
        return [p.slot.parameters(p.adapter)["m"].detach().view(self.n, -1) for k, p in self.layers.items() if k in MAKES]

    def alive(self) -> Tensor:
        """(n,) which groups are left."""
        return self.masks[0].ne(0).any(1)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """(n,) s from the gradients as they are."""
        total = torch.zeros(self.n)
        for k, p in self.layers.items():
            A, B = p.A.detach(), p.B.detach()
            gA, gB = (torch.zeros_like(t) if t.grad is None else t.grad for t in (p.A, p.B))
            G = gB @ A + B @ gA - gB @ gA
            S = (G * (p.slot.map({}).weight() + p.s * B @ A)).abs().sum(1 if k in MAKES else 0).view(self.n, -1).sum(1)
            total += (S / S.norm().clamp_min(torch.finfo(S.dtype).tiny)).float().to("cpu")
        return total


def prunable(model: nn.Module, adapter: str | None = None) -> list[Block]:
    """Heads and channels that an adapter of the method lora-prune can switch off, in the model's order. LorakitError where there are none."""
    found: dict[tuple[str, str], dict[str, Pair]] = {}
    for p in pairs(model, still=True):
        path, _, name = p.path.rpartition(".")
        kind, masked = MAKES.get(name) or TAKES.get(name), p.method.leaves.get("m")
        if kind and masked is not None and not masked.trains and not p.slot.site.stack and adapter in (None, p.adapter):
            found.setdefault((path, kind), {})[name] = p
    out = []
    for (path, kind), layers in found.items():
        decides = next((layers[k] for k in DECIDES[kind] if k in layers), None)
        if decides is None:
            continue
        width = getattr(model.get_submodule(path), "head_dim", None) if kind == HEADS else 1
        if width is None:
            raise LorakitError(f"lora_prune: {path} does not say its head_dim, so its heads are not known; mend: exclude_modules: {decides.path}")
        out.append(Block(path, kind, decides.slot.site.out // width, layers))
    if not out:
        raise LorakitError(f"lora_prune: no adapter of the method lora-prune on the values or channels of a block ({', '.join(DECIDES[HEADS])}; "
                           f"{', '.join(DECIDES[CHANNELS])}); mend: method: lora-prune, target_modules: all-linear")
    return out


@torch.no_grad()
def pruned(model: nn.Module, adapter: str = "default") -> nn.Module:
    """A new model, merged, without the heads and channels that the adapter switched off: the same function of smaller matrices.

    Its widths may differ from block to block, which most configurations cannot say: keep it with torch.save, or keep the merged one, whose rows are
    zero. LorakitError for layers that are not plain ones, as in a quantised base.
    """
    alive = {(b.path, b.kind): b.alive() for b in prunable(model, adapter)}
    new = api.merged(model)
    for (path, kind), keep in alive.items():
        module, n, left = new.get_submodule(path), len(keep), int(keep.sum())
        for name, layer in module.named_children():
            if kind in (MAKES.get(name), TAKES.get(name)):
                _cut(f"{path}.{name}", layer, keep, 0 if name in MAKES else 1)
        for count in ("num_heads", "num_key_value_heads") if kind == HEADS else ():
            if isinstance(getattr(module, count, None), int):
                setattr(module, count, getattr(module, count) * left // n)
    return new


def _cut(path: str, layer: nn.Module, keep: Tensor, dim: int) -> None:
    """Leaves of a layer's outputs (dim 0) or inputs (1) those of the groups that stay."""
    if type(layer) is not nn.Linear:
        raise LorakitError(f"lora_prune: {path} is a {type(layer).__name__}, of which rows and columns are not cut; mend: a dense base of nn.Linear")
    at = keep.repeat_interleave(layer.weight.shape[dim] // len(keep)).nonzero().squeeze(1).to(layer.weight.device)
    layer.weight = nn.Parameter(layer.weight.index_select(dim, at), layer.weight.requires_grad)
    if dim == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.index_select(0, at), layer.bias.requires_grad)
    layer.out_features, layer.in_features = layer.weight.shape
