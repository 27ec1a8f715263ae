"""BYOM-LoRA: each task vector shrunk before they are summed. Jiang et al., 2023, arXiv 2310.01886.

    ΔW = Σ w_t U_q diag(σ_q) V_qᵀ   of   ΔW_t = U diag(σ) Vᵀ

q: `shrunk`, by default half of the source's rank (at least 1). Paper: the shrunk adapters stay apart, one for each task; one of
them alone is `lorakit shrink`.
"""

from __future__ import annotations

from lorakit.errors import LorakitError
from lorakit.merges.base import Rule, Vector, project, rule, total


@rule("byom", "BYOM-LoRA", "Σ w svd_q(ΔW)", "2310.01886")
class BYOM(Rule):
    shrunk: int | None = None  # rank that each source is lowered to

    def __post_init__(self):
        if self.shrunk is not None and self.shrunk < 1:
            raise LorakitError(f"byom: shrunk must be at least 1, not {self.shrunk}")

    def merge(self, vectors, weights, at):
        some = [v if v.rank == 0 else Vector(project(v, self.shrunk or max(1, (v.rank or min(v.shape[-2:])) // 2))[:2]) for v in vectors]
        return total(some, weights)
