"""One file per parametrisation or wrapper. Importing this package fills `lorakit.method.METHODS`."""

from lorakit.methods import full, lora, magnitude, offset  # noqa: F401
