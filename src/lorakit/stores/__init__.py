"""How a frozen weight is kept: one file per way. `store_for(module)` picks the one that claims the layer."""

from __future__ import annotations

from torch import nn

from lorakit.errors import LorakitError
from lorakit.stores import affine, normal_float  # noqa: F401
from lorakit.stores.bitsandbytes import EightBits, FourBits
from lorakit.stores.dense import Dense, Store
from lorakit.stores.guest import Guest
from lorakit.stores.hqq import HQQ
from lorakit.stores.packed import Packed
from lorakit.stores.torchao import TorchAO

STORES: dict[str, type[Store]] = {"dense": Dense, "packed": Packed, "bitsandbytes-4bit": FourBits, "bitsandbytes-8bit": EightBits, "torchao": TorchAO,
                                  "hqq": HQQ}


def store_for(module: nn.Module) -> Store:
    """The first store that says it can hold this layer's weight; dense comes last."""
    for cls in reversed(STORES.values()):
        if cls.claims(module):
            return cls(module)
    raise LorakitError(f"no store can read the weight of {type(module).__name__}")


def guest(module: nn.Module) -> Guest | None:
    """The store of a layer that another library has quantised; None for other modules."""
    return next((cls(module) for cls in STORES.values() if issubclass(cls, Guest) and cls.claims(module)), None)
