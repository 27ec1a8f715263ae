"""L-LoRA: LoRA made linear around its start. Tang et al., 2023, arXiv 2310.04742 ("partial linearization").

    W' = W + s [B0 A0 + (B - B0) A0 + B0 (A - A0)]          A0, B0: frozen copies of the factors as they started,   s = alpha / r

The effect is linear in (A, B), so that adding up what several trainings from one start changed adds up what they do to the layer's output: a mix of
such adapters is exact in function, not only in weights, layer by layer. All must share A0 and B0 (the same seed). With LoRA's own start, B0 = 0, it
is W + s B A0: A has no gradient, and what is saved is a plain LoRA of rank r. Any other start makes one of rank 2r, [s B, s B0] [A0; A - A0]; where
the start is subtracted (`offset`), B - B0 stands in B's place.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.method import LowRank, Method, Wrapper, method
from lorakit.methods.lora import LoRA
from lorakit.methods.offset import Offset


@method("l-lora", title="L-LoRA", paper="2310.04742", formula="W + s [B A0 + B0 (A - A0)]", laws=("identity",))
class LLoRA(Wrapper, LowRank):
    plain_in_files = True

    inner: Method  # LoRA, or an offset around it

    def __post_init__(self):
        if type(self._lora) is not LoRA:
            raise LorakitError(f"l-lora makes a LoRA linear around its start, not {self.inner.name}")

    @property
    def _lora(self) -> Method:
        return self.inner.inner if isinstance(self.inner, Offset) else self.inner

    @property
    def leaves(self):
        return Offset(self._lora).leaves

    def key(self, leaf, lookup=False):
        return Offset(self._lora).key(leaf, lookup)

    def settle(self, p, W):
        Offset(self._lora).settle(p, W)

    def factors(self, p):
        s, dB = self._lora.s, p["B"] - p["B0"] if isinstance(self.inner, Offset) else p["B"]
        return torch.cat([dB, p["B0"]], -1) * s, torch.cat([p["A0"], p["A"] - p["A0"]], -2)

    def for_files(self, p):
        """A plain LoRA of rank r where one of the factors started at zero: only the other's start matters then."""
        for start, leaves in (("B0", {"A": "A0", "B": "B"}), ("A0", {"A": "A", "B": "B0"})):
            if not isinstance(self.inner, Offset) and not p[start].any():
                return self._lora, {k: p[v] for k, v in leaves.items()} | {k: p[k] for k in ("d",) if k in p}
        return self, p
