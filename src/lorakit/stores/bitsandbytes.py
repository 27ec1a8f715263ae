"""Layers of bitsandbytes: `Linear4bit` (NF4, FP4; QLoRA, arXiv 2305.14314) and `Linear8bitLt` (LLM.int8, arXiv 2208.07339).

NF4 codes and constants are those of our own NF4, so the product is ours too; bitsandbytes 0.50 itself reads a matrix wrongly on a CPU where its blocks
straddle rows of a multiple of 16 (128 x 96 in blocks of 64). On CPUs with AVX512-BF16 bitsandbytes lays the codes out anew, in
place, and rounds the constants at the first call in evaluation; from then on reading the weight gives something else and gradients vanish. So that is
switched off for a layer as soon as it is looked at here, and refused where it has happened.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.kernels.decode import blocks
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
    def parts(self) -> tuple[NormalFloat, Parts]:
        """As our own scheme and its parts, which share their memory; FP4 has other numbers for its codes."""
        state = self.state
        if state.nested and state.state2.blocksize != NESTED:
            raise LorakitError(f"the constants are kept in blocks of {state.state2.blocksize}, and bitsandbytes itself knows only {NESTED}")
        parts = {"codes": self.module.weight.detach().view(torch.uint8).view(-1), "absmax": state.absmax if state.nested else state.absmax.float()}
        if state.nested:
            parts |= {"nested_absmax": state.state2.absmax.float(), "offset": state.offset.float()}
        return NormalFloat(4, state.blocksize, state.nested), parts

    @property
    def normal(self) -> bool:
        return self.state.quant_type == "nf4"

    def dense(self, dtype):
        scheme, parts = self.parts
        n, m = self.shape
        if self.normal:
            return scheme.matrix(parts, n, m, dtype)
        c = scheme.constants(parts, 0, -(-n * m // scheme.block))
        return blocks(parts["codes"], tuple(self.state.code.tolist()), 4, c, scheme.block, 0, n * m, dtype).view(n, m)

    def linear(self, site, x, bias):
        if not self.normal:
            return super().linear(site, x, bias)
        scheme, parts = self.parts
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

    def tensors(self, kept):
        on = kept["weight"].SCB
        return {"weight": kept["weight"].data, "SCB": kept["state"].SCB if on is None else on}
