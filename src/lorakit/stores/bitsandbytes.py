"""Layers of bitsandbytes: `Linear4bit` (NF4, FP4; QLoRA, arXiv 2305.14314) and `Linear8bitLt` (LLM.int8, arXiv 2208.07339).

NF4 codes and constants are those of our own NF4, so the product is ours too. On CPUs with AVX512-BF16 bitsandbytes lays the codes out anew, in
place, and rounds the constants at the first call in evaluation; from then on reading the weight gives something else and gradients vanish. So that is
switched off for a layer as soon as it is looked at here, and refused where it has happened.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.stores.guest import Guest, comes_from
from lorakit.stores.normal_float import NESTED, NormalFloat
from lorakit.stores.product import Product
from lorakit.stores.scheme import Parts

RAW = "bitsandbytes has not quantised this layer yet, which it does when the model moves; mend: model.to(device) first, cpu too"


class FourBits(Guest):
    """bitsandbytes' Linear4bit."""

    title, formula = "4 bits of bitsandbytes", "w ≈ q[code] · c_k"
    eps = 0.12  # of FP4; NF4 has less
    kept = ("weight", "quant_state")

    def __init__(self, module):
        super().__init__(module)
        module.support_avx512bf16_for_cpu = False
        self.state  # noqa: B018 - refuses what has been laid out anew

    @staticmethod
    def claims(module):
        return comes_from(type(module), "bitsandbytes", "Linear4bit") and hasattr(module.weight, "quant_state")

    @property
    def state(self):
        """bitsandbytes' QuantState. LorakitError where there is none, or no longer one that can be read."""
        state = self.module.weight.quant_state or self.module.quant_state
        if state is None:
            raise LorakitError(RAW)
        if getattr(state, "packing_format_for_cpu", False):
            raise LorakitError("bitsandbytes laid this layer's weight out anew for this CPU at a call in evaluation, and rounded its constants; adapters on it "
                               "would be wrong. Mend: load the model again and adapt it before its first call (or, before that call, set "
                               "layer.support_avx512bf16_for_cpu = False on its Linear4bit layers)")
        return state

    @property
    def dtype(self):
        return self.state.dtype

    @property
    def shape(self):
        return tuple(self.state.shape)

    @property
    def ours(self) -> tuple[NormalFloat, Parts] | None:
        """As our own scheme and its parts, which share their memory; None for FP4."""
        state = self.state
        if state.quant_type != "nf4" or (state.nested and state.state2.blocksize != NESTED):
            return None
        parts = {"codes": self.module.weight.detach().view(torch.uint8).view(-1), "absmax": state.absmax if state.nested else state.absmax.float()}
        if state.nested:
            parts |= {"nested_absmax": state.state2.absmax.float(), "offset": state.offset.float()}
        return NormalFloat(4, state.blocksize, state.nested), parts

    def dense(self, dtype):
        if ours := self.ours:
            return ours[0].matrix(ours[1], *self.shape, dtype)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.module.weight.data, self.state).to(dtype)

    def linear(self, site, x, bias):
        if not (ours := self.ours):
            return super().linear(site, x, bias)
        scheme, parts = ours
        return Product.apply(x, bias, scheme, self.shape, tuple(parts), *parts.values(), *[None] * (4 - len(parts)))

    def write(self, W):
        from bitsandbytes.functional import quantize_4bit

        was, state = self.module.weight, self.state
        codes, new = quantize_4bit(W.detach().to(was.device, state.dtype).contiguous(), blocksize=state.blocksize, compress_statistics=state.nested,
                                   quant_type=state.quant_type, quant_storage=was.quant_storage)
        weight = type(was)(codes, requires_grad=False, quant_state=new, blocksize=state.blocksize, compress_statistics=state.nested,
                           quant_type=state.quant_type, quant_storage=was.quant_storage, module=self.module, bnb_quantized=True)
        self.put({"weight": weight, "quant_state": new})

    def tensors(self, kept):
        weight = kept["weight"]
        state = weight.quant_state or kept["quant_state"]
        out = {"weight": weight.data, "weight.absmax": state.absmax}
        return out | {"weight.nested_absmax": state.state2.absmax, "weight.offset": state.offset} if state.nested else out


class EightBits(Guest):
    """bitsandbytes' Linear8bitLt; w ≈ q s / 127 with s = max |w| of the row."""

    title, formula = "8 bits of bitsandbytes", "w ≈ q · s_row / 127"
    eps = 0.01
    kept = ("weight", "state")

    def __init__(self, module):
        super().__init__(module)
        self.seen = torch.get_default_dtype()  # what the inputs were last; the layer does not keep what its weight was
        if module.weight.dtype != torch.int8:
            raise LorakitError(RAW)

    @staticmethod
    def claims(module):
        return comes_from(type(module), "bitsandbytes", "Linear8bitLt") and hasattr(module.weight, "SCB") and not module.state.has_fp16_weights

    @property
    def scale(self) -> Tensor:
        """(o,): the first call moves it from the weight to the layer's state."""
        on = self.module.weight.SCB
        return self.module.state.SCB if on is None else on

    @property
    def dtype(self):
        return self.seen if self.module.bias is None else self.module.bias.dtype

    def linear(self, site, x, bias):
        self.seen = x.dtype
        return super().linear(site, x, bias)

    @property
    def shape(self):
        return tuple(self.module.weight.shape)

    def dense(self, dtype):
        return (self.module.weight.data.float() * (self.scale * (1 / 127))[:, None]).to(dtype)

    def write(self, W):
        was, state = self.module.weight, copy(self.module.state)
        state.CB = state.SCB = None  # the layer takes them from the weight at its next call
        weight = type(was)(W.detach().float().cpu(), requires_grad=False, has_fp16_weights=False).to(was.device)
        self.put({"weight": weight, "state": state})

    def put(self, kept):
        state, weight = kept["state"], kept["weight"]
        if weight.CB is not None:
            state.CB = state.SCB = None
        super().put(kept)

    def tensors(self, kept):
        on = kept["weight"].SCB
        return {"weight": kept["weight"].data, "SCB": kept["state"].SCB if on is None else on}
