"""What accelerate does to a module whose tensors it keeps elsewhere: its forward is replaced on the instance, sometimes a whole block's at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MethodType

from torch import nn

from lorakit.errors import LorakitError


def own_forwards(module: nn.Module) -> list[str]:
    """The attributes under which accelerate keeps the class's own forward on a module: while it is hooked, and after."""
    kept = {k: vars(module).get(k) for k in ("_old_forward", "forward")}
    return [k for k, f in kept.items() if isinstance(f, MethodType) and f.__self__ is module and f.__func__ is type(module).forward]


def change_class(module: nn.Module, cls: type) -> None:
    """Gives a module another class; what accelerate keeps of the old one's forward becomes the new one's."""
    own = own_forwards(module)
    module.__class__ = cls
    for k in own:
        setattr(module, k, MethodType(cls.forward, module))


def check_blocks(modules: Mapping[str, nn.Module], targets: Iterable[str]) -> None:
    """LorakitError for a target inside a block that accelerate loads and drops as one: it would drop the adapter with it."""
    hooks = {n: hook for n, m in modules.items() if (hook := vars(m).get("_hf_hook")) is not None}
    blocks = tuple(f"{n}." if n else "" for n, hook in hooks.items() if getattr(hook, "offload", False) and hook.place_submodules)
    if inside := next((p for p in targets if blocks and p.startswith(blocks)), None):
        raise LorakitError(f"{inside}: accelerate offloads the block around it as one (preload_module_classes), so an adapter inside would be lost; "
                           "mend: offload it without preload_module_classes")
