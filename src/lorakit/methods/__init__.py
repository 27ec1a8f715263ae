"""One file per parametrisation or wrapper. Importing this package fills `lorakit.method.METHODS`."""

from lorakit.methods import bitfit, full, lora, magnitude, offset, tokens, trained_bias, transposed  # noqa: F401
