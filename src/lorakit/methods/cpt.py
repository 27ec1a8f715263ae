"""Context-aware prompt tuning: worked examples in front of the input, each token free to move a little. Blau et al., 2024, arXiv 2410.17222.

    model([E(context) + D; E(x)]) in place of model(E(x));   no weight changes, W' = W
    |D_i| <= eps_type(i) sqrt(d / 2048),   D_i = 0 for the labels of the context

`token_ids` is the context, `types` says of each token what it is, modulo 4: 1 a template of inputs, 2 an input, 3 a template of outputs,
0 (and more than 0) a label; every example goes on counting from where the one before ended. D (n, d) trains from zero, which is the model
with its context, not the bare model. Before each call in training its rows are made short enough. The loss is taken over the labels of the
context and of the text; with "decay" the k-th label from the end counts decay^k. `input_type_mask` in a batch tells the types of its
tokens; without one all of them are labels.
"""

from __future__ import annotations

import math

import torch

from lorakit.errors import LorakitError
from lorakit.method import Leaf, choice, method, zeros
from lorakit.methods.prompt import Prompt, begin
from lorakit.prompts import Prompted


@method("cpt", title="Context-aware prompt tuning", paper="2410.17222", formula="model([E(context) + D; E(x)])", aliases=("context-aware-prompt-tuning",))
class CPT(Prompted):
    keeps = ("input_type_mask",)

    token_ids: tuple = (0,)  # ids of the context
    types: tuple = ()  # what each of them is; all are templates where nothing is said
    eps: float = 0.1  # how far inputs may move
    format_eps: float = 0.1  # how far templates may move
    weighted: str = choice("none", ("none", "decay"))  # whether later labels count more
    decay: float = 1.0  # the share of the label before

    E = Leaf("n o", begin, trains=False, key="cpt_embeddings")
    D = Leaf("n o", zeros, key="cpt_delta")

    def __post_init__(self):
        object.__setattr__(self, "token_ids", tuple(self.token_ids))
        object.__setattr__(self, "types", tuple(self.types))
        if not self.token_ids or len(self.types or self.token_ids) != len(self.token_ids):
            raise LorakitError(f"cpt: types must say what each of the {len(self.token_ids)} token_ids is, not of {len(self.types)}")

    @classmethod
    def examples(cls):
        return [cls((5, 6, 7, 8), (1, 2, 3, 4), 0.2, 0.3, "decay", 0.5)]

    @property
    def start_at(self):
        return "text"

    def dims(self, o, i):
        return super().dims(o, i) | {"n": len(self.token_ids)}

    def unfit(self, site):
        return super().unfit(site) or ("cpt is for decoders, whose context is text; mend: prompt-tuning" if site.pairs else None)

    def kinds(self, device):
        return torch.tensor(self.types or (1,) * len(self.token_ids), device=device)

    def short(self, D):
        """D with every row at most as long as its type may move."""
        kind, scale = self.kinds(D.device), (D.shape[1] / 2048) ** 0.5
        far = torch.full(kind.shape, 1e-10, device=D.device)
        for rest, eps in ((1, self.format_eps), (3, self.format_eps), (2, self.eps)):
            far = torch.where((kind > 0) & (kind % 4 == rest), eps * scale, far)
        return D * (far / D.norm(dim=1).clamp_min(1e-30).maximum(far))[:, None]

    def prompt(self, p, site):
        D = p["D"]
        if site.module.training and torch.is_grad_enabled():
            with torch.no_grad():
                D.copy_(self.short(D))
            free = (self.kinds(D.device) % 4 != 0)[:, None]
            return p["E"] + torch.where(free, D, D.detach())
        return p["E"] + self.short(D)

    def told(self, labels, mine):
        """Those that are not labels are -100; with "decay" those of one number are one label, the k-th from the end."""
        kinds = mine.get("input_type_mask")
        kinds = torch.full_like(labels, 4) if kinds is None else kinds.to(labels)
        b, n = len(labels), len(self.token_ids)
        kinds = torch.cat([self.kinds(labels.device).expand(b, n), torch.where(kinds > 0, kinds + 4 * math.ceil(max(self.types or (1,)) / 4), kinds)], 1)
        labels = torch.cat([torch.tensor(self.token_ids, device=labels.device).expand(b, n), labels], 1)
        some = (kinds > 0) & (kinds % 4 == 0)
        weight = torch.ones(labels.shape, device=labels.device)
        if self.weighted == "decay":
            for row in range(b):
                for k, number in enumerate(kinds[row][some[row]].unique().flip(0)):
                    weight[row][kinds[row] == number] = self.decay**k
        return labels.where(some, -100), weight

    def size(self, p):
        return (p["E"] + self.short(p["D"])).norm()

    def for_files(self, p):
        return Prompt(len(self.token_ids)), {"P": p["E"] + self.short(p["D"])}

    def to_dict(self):
        return super().to_dict() | {"token_ids": list(self.token_ids), "types": list(self.types)}
