"""Puts adapters on a model in place and takes them off again. Knows no method, no layer type, no dtype.

A hosted module keeps its name, its place and its identity: its class becomes one made from its own, its base keys and ties
stay, `isinstance` stays true, and `detach` gives back the very object. A layer that is called computes through its adapters;
a module that reads parameters (attention, fused experts, any other) runs with the adapted values in their place. One `State`
per model says which adapters are active; every slot points at it, so switching is one assignment and not a walk over modules.
"""

from lorakit.host.adapters import absorb, attach, delete, detach, generator, give_back, merge, restart, tentative, thaw, unload, unmerge
from lorakit.host.hooked import change_class
from lorakit.host.module import Host, Layer, Reader, bare, find_state, known, slots, slots_of, state_of, walk
from lorakit.host.slot import Absorbed, Holder, Leaves, Slot, State

__all__ = ["Absorbed", "Holder", "Host", "Layer", "Leaves", "Reader", "Slot", "State", "absorb", "attach", "bare", "change_class", "delete", "detach",
           "find_state", "generator", "give_back", "known", "merge", "restart", "slots", "slots_of", "state_of", "tentative", "thaw", "unload", "unmerge",
           "walk"]
