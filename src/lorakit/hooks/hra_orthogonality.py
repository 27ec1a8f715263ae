"""HRA's orthogonality term: the reflections of a target are kept apart. Yuan et al., 2024, arXiv 2405.17484.

    loss + λ Σ_targets ‖I - Ûᵀ Û‖_F,   Û = U with columns of length one

λ to infinity makes the reflections orthogonal to each other, λ 0 leaves them free; 1e-4 is the authors' for language models. The norm is not
squared, as in their code; squared as the paper's formula prints it. In HRA's symmetric start the columns are equal in pairs, where the term has no
gradient: it works once the loss has parted them.
"""

from __future__ import annotations

import torch

from lorakit import host
from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.methods.hra import HRA


@hook("hra_orthogonality", "HRA's orthogonality term", "2405.17484", "loss + λ Σ ‖I - Ûᵀ Û‖")
class HRAOrthogonality(Hook):
    weight: float = 1e-4  # λ: of the term
    squared: bool = False  # squared norms, as the paper prints them

    def __post_init__(self):
        if not self.weight >= 0:
            raise LorakitError(f"hra_orthogonality: weight must be at least 0, not {self.weight}")

    def setup(self, model):
        cores = [(slot.methods[a].core, slot.parameters(a)) for slot in host.slots(model).values() for a in slot.methods if a not in slot.tied]
        self.of = [p["U"] for core, p in cores if isinstance(core, HRA) and not core.gram_schmidt and p["U"].requires_grad]
        if not self.of:
            raise LorakitError("hra_orthogonality: no adapter here has reflections that train and are not orthogonal anyway; mend: method hra, without "
                               "gram_schmidt")

    def extra_loss(self, model, outputs):
        norms = []
        for U in self.of:
            U = U / U.norm(dim=-2, keepdim=True)
            far = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device) - U.mT @ U
            norms.append((far.square().sum() if self.squared else torch.linalg.matrix_norm(far).sum()).to(self.of[0].device))
        return self.weight * torch.stack(norms).sum()
