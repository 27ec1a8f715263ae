"""One file per parametrisation or wrapper. Importing this package fills `lorakit.method.METHODS`."""

from lorakit.methods import bias, bitfit, full, lora, magnitude, offset, tokens, transposed  # noqa: F401
