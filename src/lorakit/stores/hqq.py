"""HQQ's linear layers: half-quadratic quantisation, Badri & Shaji, 2023, https://mobiusml.github.io/hqq_blog/.

    w ≈ (q - z) s   by groups, z and s chosen by a robust norm; 1 to 8 bits
"""

from __future__ import annotations

from torch import nn

from lorakit.errors import LorakitError
from lorakit.stores.guest import Guest, comes_from, unwritable

EPS = ((8, 0.01), (6, 0.03), (4, 0.12), (3, 0.3))  # bits -> relative error, for as many and more


class HQQ(Guest):
    """hqq's HQQLinear: the codes in `W_q`, the constants in `meta`, the bias a bare tensor."""

    title, formula = "weight of HQQ", "w ≈ (q - z) s"
    kept = ("W_q", "meta")

    def __init__(self, module):
        super().__init__(module)
        if not module.ready or module.meta is None:
            raise LorakitError("this HQQ layer has no weight yet; mend: load or initialise it before adapters go on")
        bits = module.meta["nbits"]
        self.eps = next((e for b, e in EPS if bits >= b), 0.7)
        self.writable = bool(module.quant_config)

    @staticmethod
    def claims(module):
        return comes_from(type(module), "hqq", "HQQLinear") and "weight" not in module._parameters

    @property
    def token(self):
        return self.module.W_q

    @property
    def dtype(self):
        return self.module.compute_dtype

    @property
    def shape(self):
        return tuple(self.module.meta["shape"])

    def dense(self, dtype):
        return self.module.dequantize().to(dtype)

    def write(self, W):
        m = self.module
        if not self.writable:
            raise unwritable("this HQQ layer, which does not say how it was quantised,")
        from hqq.core.quantize import HQQLinear

        new = HQQLinear.from_weights(W.detach().to(self.device, self.dtype).clone(), None, m.quant_config | {"offload_meta": m.offload_meta},
                                     compute_dtype=m.compute_dtype, device=m.device)
        m.W_q, m.meta = new.W_q, new.meta

    def take(self):
        return super().take() | {"bias": self.module.bias}

    def put(self, kept):
        m, bias = self.module, kept["bias"]
        for k in ("weight", "bias"):
            m._parameters.pop(k, None)
        super().put({k: kept[k] for k in self.kept})
        if isinstance(bias, nn.Parameter):
            m.register_parameter("bias", bias)
        else:
            vars(m)["bias"] = bias

    def tensors(self, kept):
        constants = {k: kept["meta"].get(k) for k in ("scale", "zero", "zero_scale")}
        return {"W_q": kept["W_q"]} | {k: v.clone() if v.is_inference() else v for k, v in constants.items() if v is not None}

    def thaw(self, W):
        m, dtype, bias = self.module, self.dtype, self.module.bias
        vars(m).pop("bias", None)
        m._parameters.pop("W_q")
        m.meta = None
        m.register_parameter("weight", nn.Parameter(W.detach().to(dtype).contiguous(), requires_grad=False))
        if "bias" not in m._parameters:
            m.register_parameter("bias", bias if bias is None else nn.Parameter(bias, requires_grad=False))
