"""What a run will cost, before it: bytes from a model's configuration alone, time from a short calibration, and which method then."""

from lorakit.planning.duration import Time, seconds
from lorakit.planning.guide import GOALS, Advice, advise
from lorakit.planning.memory import Memory, memory
from lorakit.planning.picture import draw

__all__ = ["GOALS", "Advice", "Memory", "Time", "advise", "draw", "memory", "seconds"]
