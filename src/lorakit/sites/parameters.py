"""Parameters that a module's own forward reads: a matrix, a stack of them, a vector."""

from __future__ import annotations

from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.sites.layers import Site
from lorakit.stores.dense import Dense, held


class ParameterSite(Site):
    """A parameter or buffer that its module's own forward reads: it is never called, the module runs with the adapted value in its place.

    Raw shapes: a matrix (o, i); a stack (E, o, i), or (E, i, o) where the module says `is_transposed`, as fused experts are kept; a
    vector (o,), which is a column (o, 1). Every matrix of a stack gets leaves of its own.
    """

    drops, read = False, True

    def __init__(self, module: nn.Module, name: str):
        self.module, self.store = module, Dense(module, name)
        self.raw = self.store.shape
        self.stack = self.raw[:1] if len(self.raw) == 3 else ()
        self.transposed = bool(self.stack) and bool(getattr(module, "is_transposed", False))
        self.bias_name = None
        self._measure()
        beside = [n for n in (name.replace("weight", "bias"), f"{name}_bias") if n != name and len(self.raw) > 1]
        fits = (t for n in beside if isinstance(t := held(module, n), Tensor) and tuple(t.shape) == (*self.stack, self.out))
        self.bias_name = next((n for n in beside if any(held(module, n) is t for t in fits)), None)

    def common(self, config):
        return not (config.get("use_dora") or config.get("lora_bias"))

    def view(self, W):
        return super().view(W) if len(self.raw) in (2, 3) else W.reshape(*self.raw[:1], -1) if len(self.raw) > 3 else W.reshape(-1, 1)

    def unview(self, M):
        return super().unview(M) if len(self.raw) in (2, 3) else M.reshape(self.raw)

    def op(self, x, M, bias=None):
        raise LorakitError(f"{type(self.module).__name__}.{self.store.name} is read by its module, not called")

    down = op

    def pack(self, t, axes):  # as PEFT lays out the factors of a stack: (E r, i) and (o, r E)
        if not self.stack or axes == "o i" or len(axes.split()) != 2:
            return super().pack(t, axes)
        return t.permute(1, 2, 0).flatten(1) if axes.startswith("o ") else t.flatten(0, 1)

    def unpack(self, t, axes):
        if not self.stack or axes == "o i" or len(axes.split()) != 2:
            return super().unpack(t, axes)
        E = self.stack[0]
        return t.unflatten(1, (-1, E)).permute(2, 0, 1) if axes.startswith("o ") else t.unflatten(0, (E, -1))


class OutProjectionSite(ParameterSite):
    """The out-projection of torch's attention. PEFT (0.21.2 and before) adds its update twice, live and merged, so in PEFT's files half a
    factor stands for a whole one; halving and doubling are exact."""

    def pack(self, t, axes):
        return t / 2 if axes == "o r" else super().pack(t, axes)

    def unpack(self, t, axes):
        return t * 2 if axes == "o r" else super().unpack(t, axes)
