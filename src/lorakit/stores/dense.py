"""The contract of a store, and the store for an ordinary floating-point parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.stores.shards import WRITES, scattered, whole


class Store(ABC):
    """Reads and writes one layer's weight in its raw layout, and runs the layer's own kernel.

    `write` replaces the weight object and never changes it in place: the weight may be tied to another module. A quantised weight stays so, with
    a relative error of about `eps`. `take` gives what `put` needs to undo a `write` exactly, to the bit.
    """

    title: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    eps: float = 0.0  # relative error of one write() followed by read()
    writable: bool = True
    packs: ClassVar[bool] = False  # read() makes the weight anew each time
    idempotent: ClassVar[bool] = False  # rounded() looks at nothing but its input, and changes no code of what it made
    plain: type[nn.Module] | None = None  # the layer's class once it is thawed; None: the weight is an ordinary parameter

    def __init__(self, module: nn.Module):
        self.module = module

    @staticmethod
    @abstractmethod
    def claims(module: nn.Module) -> bool: ...

    @abstractmethod
    def read(self, dtype: torch.dtype | None = None) -> Tensor:  # raw layout, floating point
        ...

    @abstractmethod
    def write(self, W: Tensor) -> None: ...

    @abstractmethod
    def take(self) -> object: ...

    @abstractmethod
    def put(self, kept: object) -> None: ...

    @abstractmethod
    def linear(self, site, x: Tensor, bias: Tensor | None) -> Tensor:  # the layer's own product
        ...

    @property
    def operand(self) -> Tensor | None:
        """What `linear` acts with, raw, where it is there as an ordinary tensor and need not be made."""
        return None

    def thaw(self, W: Tensor) -> None:
        """Puts an ordinary parameter in the place of a quantised weight; who calls it gives the layer the class `plain`."""
        self.write(W)

    def rounded(self, W: Tensor) -> Tensor:
        """A weight as it reads after `write`, at least float32."""
        return W.to(self.dtype).to(torch.promote_types(self.dtype, torch.float32))

    def original(self) -> Tensor | None:
        """The weight from before it was quantised; None where that is not known."""
        return None

    @abstractmethod
    def tensors(self, kept: object) -> dict[str, Tensor]:
        """What `take` gave, by the names that the layer knows it by."""

    @property
    def token(self) -> Tensor:
        """A tensor that is another, or another version, once the weight has changed."""
        return self.read()

    @property
    def dtype(self) -> torch.dtype:
        return self.read().dtype

    @property
    def device(self) -> torch.device:
        return self.read().device

    @property
    def shape(self) -> tuple[int, ...]:  # raw
        return tuple(self.read().shape)


def held(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of a module, whole: what accelerate has offloaded as its hook keeps it, what FSDP2 spreads gathered."""
    t = module._parameters[name] if name in module._parameters else getattr(module, name, None)
    if isinstance(t, Tensor) and t.device.type == "meta":
        hook = getattr(module, "_hf_hook", None)
        kept = getattr(hook, "weights_map", None)
        return t if kept is None else kept[name].to(hook.execution_device)
    return whole(t)


class Dense(Store):
    """A floating-point parameter, or buffer, of a module: `weight` unless another name is given."""

    title, formula = "dense weight", "W"

    def __init__(self, module: nn.Module, name: str = "weight"):
        super().__init__(module)
        self.name = name

    @staticmethod
    def claims(module):
        W = getattr(module, "weight", None)
        return isinstance(W, Tensor) and W.is_floating_point()

    def read(self, dtype=None):
        W = held(self.module, self.name)
        return W if dtype is None else W.to(dtype)

    def write(self, W):
        was = self.take()
        if scattered(was):
            raise LorakitError(WRITES)
        if was.device.type == "meta":
            raise LorakitError("this weight is offloaded (or was never loaded), so writing it would be lost at the next call; "
                               "mend: load the model without offload")
        W = W.detach().to(was.dtype).contiguous()
        self.put(nn.Parameter(W, requires_grad=False) if self.name in self.module._parameters else W)

    def take(self):
        return getattr(self.module, self.name)

    def put(self, kept):
        setattr(self.module, self.name, kept)

    def tensors(self, kept):
        return {self.name: kept}

    @property
    def operand(self):
        return getattr(self.module, self.name)

    def linear(self, site, x, bias):
        return site.op(x, site.view(self.operand), bias)
