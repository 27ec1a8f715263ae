"""AutoLoRA: a weight for each rank-one component, learnt on rows of its own, says how many a layer needs. Zhang et al., 2024, arXiv 2403.09113.

    W' = W + s B diag(α) A,   α = softmax(a) (r),   A (r, i), B (o, r)
    lower level, 70 % of the rows:   A, B        upper level, the rest:   a, through one step of A and B, as `hooks/two_levels.py` says it
    after the last step   rank of a target = #{k : α_k >= 1 / r},   the other components closed

The finished search is saved as a LoRA of those ranks (on the method `sora`, whose start is LoRA's). As in the paper it is then trained anew
on all rows: `retrained(model)` is the Spec, and the `rank_pattern` of the saved adapter_config.json the same in YAML. The equality 1 / r
counts, to 1e-6, so that equal weights keep every component. α adds up to one, so that the search works at about 1 / r of the strength of
the retraining. Rates and averages of a are those of the public code, which thresholds a / Σa in one script and softmax(a) in the others.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from lorakit import host
from lorakit.errors import LorakitError
from lorakit.hooks.base import hook
from lorakit.hooks.components import Gated, gated, known_total
from lorakit.hooks.two_levels import TwoLevels
from lorakit.methods.lora import LoRA
from lorakit.spec import Spec


def needed(g: Gated) -> torch.Tensor:
    """Which components have at least an equal share of the weight, (matrices, r)."""
    return g.flat(g.gate) >= 1 / g.r - 1e-6


def rank(g: Gated) -> int:
    """How many a target needs; of a stack the most of its matrices."""
    return int(needed(g).sum(-1).max())


@hook("autolora", "AutoLoRA", "2403.09113", "rank = #{k : softmax(a)_k >= 1/r}, a on rows of its own through one step of A, B")
class AutoLoRA(TwoLevels):
    held: float = 0.3  # share of the training rows on which a trains
    lower: int = 1  # steps of A and B from one step of a to the next
    upper: int = 1  # steps of a in a turn
    lr: float = 3e-4  # rate of a; 0: that of the rest
    beta1: float = 0.5  # of Adam's averages for a
    beta2: float = 0.999  # of the averages of their squares
    first_order: bool = False  # without the second derivative
    epsilon: float = 0.01  # length of the way along the gradient to both sides
    seed: int = 0  # of the rows kept apart and their batches

    def __post_init__(self):
        super().__post_init__()
        self.adam = {"betas": (self.beta1, self.beta2)}

    def start(self, model, optimizer, total):
        super().start(model, optimizer, total)
        self.total = known_total(total, "autolora")

    @torch.no_grad()
    def on_interval(self, model, optimizer, scheduler, step):
        if step == self.total:
            for g in self.of:
                g.flat(g.gate).masked_fill_(~needed(g), 0)

    def ranks(self) -> dict[str, int]:
        """Target -> components it needs as the weights are now; of a stack the most of its matrices."""
        return {g.path: rank(g) for g in self.of}

    def summary(self):
        found = list(self.ranks().values())
        return (f"ranks from {min(found)} to {max(found)}, {sum(found) / len(found):.1f} on average of {max(g.r for g in self.of)}, found on the "
                f"{self.held:.0%} of the rows kept apart; to train anew with them: the rank_pattern of the saved adapter_config.json")


def retrained(model: nn.Module, adapter: str = "default") -> Spec:
    """The second phase, when a search has ended: a Spec of plain LoRA with the ranks it found, to train from the start on all rows.

        adapt(base, "sora", r=8);  a training with the hook;  spec = retrained(base);  adapt(base_anew, spec);  the training proper

    W' = W + (alpha / r_l) B A with the search's targets, alpha, dropout and seed. LorakitError where the adapter has no trained gates.
    """
    first, of = host.known(model, [adapter]).specs[adapter], [g for g in gated(model, "autolora") if g.adapter == adapter]
    if not of:
        raise LorakitError(f"autolora: adapter `{adapter}` has no gates; mend: the adapter of the search, before it is saved and folded")
    core = first.method.core
    return replace(first, method=first.method.over_core(lambda _: LoRA(core.r, core.alpha)), rank_pattern={f"^{g.path}": rank(g) for g in of},
                   alpha_pattern={}, patterns={}, init=None, init_options={}, freeze=(), recipe="")
