"""PRILoRA's pruning: the part of A that matters least for the inputs it gets is zeroed, again and again. Benedek, Wolf, 2024, arXiv 2401.11316.

    x̄_j := β x̄_j + (1 - β) ‖X_:j‖ (the layer's inputs in a step);   every k steps, in each row of A: the lowest share of |A_ij| x̄_j := 0

What was zeroed may grow again; the last step prunes once more, so that the saved adapter has the share it says. B is not pruned. The
period, the share and β are this library's choice, as the paper's own are not settled. Its ranks, which grow with depth, come from
`lorakit.hooks.ranks.rank_ladder`. Padding is left out where the model gets an attention mask.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.factors import pairs


@hook("prilora", "PRILoRA's pruning", "2401.11316", "the lowest half of |A_ij| ‖x_j‖ in each row of A := 0")
class PRILoRA(Hook):
    every: int = 40  # k: steps from one pruning to the next
    share: float = 0.5  # of each row of A that is zeroed, rounded down
    beta: float = 0.9  # of the average of input norms

    def __post_init__(self):
        if self.every < 1 or not 0 <= self.share < 1 or not 0 <= self.beta < 1:
            raise LorakitError(f"prilora: every is at least 1, share and beta from 0 to below 1, not {self.every}, {self.share}, {self.beta}")

    def setup(self, model):
        self.pairs, self.mean, self.sums, self.mask = pairs(model, "prilora"), {}, {}, None
        for p in self.pairs:
            site = p.slot.site
            if site.read or site.stack or site.lookup or site.slides:
                raise LorakitError(f"prilora: {p.path} is no linear layer, whose inputs belong to the columns of A; mend: leave it out of the targets")
        self.handles = [model.register_forward_pre_hook(self._note, with_kwargs=True)]
        for path, module in {p.path: p.slot.module for p in self.pairs}.items():
            self.handles.append(module.register_forward_pre_hook(lambda m, args, path=path: self._saw(path, m, args[0])))

    def start(self, model, optimizer, total):
        self.total = total

    def _note(self, module, args, kwargs):
        self.mask = kwargs.get("attention_mask")

    @torch.no_grad()
    def _saw(self, path, module, x):
        if module.training:
            x = x.detach().float()
            if self.mask is not None and self.mask.shape == x.shape[:-1]:
                x = x * self.mask[..., None].to(x)
            new = x.square().flatten(0, -2).sum(0)
            self.sums[path] = self.sums[path] + new if path in self.sums else new

    @torch.no_grad()
    def after_step(self, model, optimizer, step):
        paths = sorted({p.path for p in self.pairs})
        parallel = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        for path in paths:
            norm = self.sums.get(path)
            if parallel:
                norm = torch.zeros(next(p for p in self.pairs if p.path == path).A.shape[-1], device=self.pairs[0].A.device) if norm is None else norm
                dist.all_reduce(norm)
            if norm is not None:
                old = self.mean[path].to(norm) if path in self.mean else torch.zeros_like(norm)
                self.mean[path] = self.beta * old + (1 - self.beta) * norm.sqrt()
        self.sums = {}
        if (step + 1) % self.every == 0 or step + 1 == self.total:
            for p in self.pairs:
                if p.path in self.mean and p.A.requires_grad and (n := int(self.share * p.A.shape[-1])):
                    score = p.A.abs() * self.mean[p.path].to(p.A)
                    p.A.scatter_(-1, score.argsort(dim=-1, stable=True)[..., :n], 0.0)

    def state_dict(self):
        return {"mean": dict(self.mean)}

    def load_state_dict(self, state):
        self.mean = dict(state["mean"])

    def close(self, model):
        for h in self.handles:
            h.remove()
