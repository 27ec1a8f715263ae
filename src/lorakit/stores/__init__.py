"""How a frozen weight is kept: one file per way. `store_for(module)` picks the one that claims the layer."""

from __future__ import annotations

from torch import nn

from lorakit.errors import LorakitError
from lorakit.stores import affine, normal_float  # noqa: F401
from lorakit.stores.dense import Dense, Store
from lorakit.stores.packed import Packed

STORES: dict[str, type[Store]] = {"dense": Dense, "packed": Packed}


def store_for(module: nn.Module) -> Store:
    """The first store that says it can hold this layer's weight; dense comes last."""
    for cls in reversed(STORES.values()):
        if cls.claims(module):
            return cls(module)
    raise LorakitError(f"no store can read the weight of {type(module).__name__}")
