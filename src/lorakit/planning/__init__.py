"""What a run will cost, before it: bytes from a model's configuration alone."""

from lorakit.planning.memory import Memory, memory

__all__ = ["Memory", "memory"]
