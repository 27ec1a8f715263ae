"""Linear layers whose weight torchao has quantised: an ordinary nn.Linear with a tensor subclass for its weight."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.stores.guest import Guest, comes_from, unwritable


class TorchAO(Guest):
    """Any torchao tensor that can be made dense; 8-bit rows can be written too."""

    title, formula = "weight of torchao", "weight.dequantize()"
    eps = 0.01

    def __init__(self, module):
        super().__init__(module)
        if type(self.token).dequantize is Tensor.dequantize:
            raise LorakitError(f"{type(self.token).__name__} of torchao has no dequantize(), so no adapter can be exact on it; mend: another of torchao's "
                               "configurations (Int8WeightOnlyConfig), or lorakit.quantize")
        self.writable = type(self.token).__name__ == "Int8Tensor" and self.token.act_quant_scale is None and self.by_row

    @staticmethod
    def claims(module):
        W = getattr(module, "weight", None)
        return isinstance(W, Tensor) and comes_from(type(W), "torchao")

    @property
    def by_row(self) -> bool:
        W = self.token
        return list(W.block_size) == [1, W.shape[1]]

    @property
    def plain(self):
        cls = type(self.module)
        while hasattr(cls, "own_class"):
            cls = cls.own_class
        return cls

    @property
    def dtype(self):
        return self.token.dtype

    @property
    def shape(self):
        return tuple(self.token.shape)

    def dense(self, dtype):
        return self.token.detach().dequantize().to(dtype)

    def write(self, W):
        from torchao.quantization import PerRow

        was = self.token
        if not self.writable:
            raise unwritable(type(was).__name__)
        new = type(was).from_hp(W.detach().to(was.device, was.dtype).contiguous(), PerRow(), act_quant_kwargs=was.act_quant_kwargs)
        self.module.weight = torch.nn.Parameter(new, requires_grad=False)

    def tensors(self, kept):
        W = kept["weight"]
        return {f"weight.{n}": t for n in W.tensor_data_names for t in [getattr(W, n)]} if hasattr(W, "tensor_data_names") else {"weight": W.dequantize()}
