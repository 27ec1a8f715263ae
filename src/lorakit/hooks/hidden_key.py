"""HiddenKey: whole keys are dropped in attention, entries in the feed-forward, and two passes are to agree. Wang et al., 2024, arXiv 2403.00812.

    attention:     for each row and head, key k is unseen by every query but its own with probability p           (softmax renormalises)
    feed-forward:  y := y ⊙ mask / (1 - p)
    loss:          L1 + L2 + β/2 (KL(P1 | P2) + KL(P2 | P1)),   two passes with other masks;   without kl: L1

A query always sees its own key, so that none is left with nothing. On the later part of the blocks only, as the paper advises for decoders.
With kl the second pass doubles the time of a step. Masks come from torch's own generator: each process has others, as with any dropout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.branches import branches


@hook("hidden_key", "HiddenKey", "2403.00812", "attention without random keys, feed-forward dropout, KL of two passes")
class HiddenKey(Hook):
    p: float = 0.1  # probability that a key, or an entry of the feed-forward's output, is dropped; the paper tries 0.01 to 0.2
    kl: float = 0.0  # β: weight of the two passes' disagreement; 0: one pass. The paper tries 0.01 to 10
    later: float = 0.5  # share of the blocks, the last ones, in which it is done; 1 for encoders

    def __post_init__(self):
        if not 0 <= self.p < 1 or self.kl < 0 or not 0 < self.later <= 1:
            raise LorakitError(f"hidden_key: p below 1, kl at least 0, later above 0 and at most 1, not {self.p}, {self.kl}, {self.later}")

    def setup(self, model):
        found = branches(model, "hidden_key")
        n = max(1, round(len(found) // 2 * self.later))
        self.heads = model.config.get_text_config().num_attention_heads
        self.handles, self.given, self.second = [], None, False
        for b in found[-2 * n :]:
            if b.kind == "attention":
                self.handles.append(b.module.register_forward_pre_hook(self.drop_keys, with_kwargs=True))
            else:
                self.handles.append(b.module.register_forward_hook(
                    lambda module, args, out: F.dropout(out, self.p) if module.training else None))
        self.handles.append(model.register_forward_pre_hook(self._note, with_kwargs=True))

    def _note(self, module, args, kwargs):
        if self.kl and module.training and not self.second:
            self.given = None if args else {k: v for k, v in kwargs.items() if k != "num_items_in_batch"}

    def drop_keys(self, module, args, kwargs):
        """The attention mask, with columns of it closed."""
        if not module.training or not self.p:
            return None
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        b, n = x.shape[:2]
        dropped = torch.rand(b, self.heads, 1, n, device=x.device) < self.p
        seen = ~dropped | torch.eye(n, dtype=torch.bool, device=x.device)
        mask = kwargs.get("attention_mask")
        if mask is None:
            seen = seen & torch.ones(n, n, dtype=torch.bool, device=x.device).tril() if getattr(module, "is_causal", True) else seen
        elif mask.dtype == torch.bool:
            seen = seen & mask
        low = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill(~seen, torch.finfo(x.dtype).min)
        return args, {**kwargs, "attention_mask": low if mask is None or mask.dtype == torch.bool else torch.minimum(low, mask.to(x.dtype))}

    def extra_loss(self, model, outputs):
        if not self.kl:
            return 0.0
        if self.given is None:
            raise LorakitError("hidden_key: the model's inputs did not come by name, so the second pass cannot be made; mend: model(**batch), or kl: 0")
        given, self.given, self.second = self.given, None, True
        again = model(**given)
        self.second = False
        one, two = outputs["logits"].float().log_softmax(-1), again["logits"].float().log_softmax(-1)
        each = ((one.exp() - two.exp()) * (one - two)).sum(-1)  # KL both ways
        labels = given.get("labels")
        if labels is not None and each.dim() == labels.dim() == 2:  # tokens: the logits at a place predict the next one
            there = labels[:, 1:] != -100
            each = each[:, :-1][there]
        return again["loss"] + self.kl / 2 * each.mean()

    def close(self, model):
        for h in self.handles:
            h.remove()
