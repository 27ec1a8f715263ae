"""Learnt tokens in front of a model's input, or of every layer's keys and values: how a call is lengthened, what comes out shortened again."""

from lorakit.prompts.columns import Columns
from lorakit.prompts.rows import Prompted
from lorakit.prompts.starts import check, linear

__all__ = ["Columns", "Prompted", "check", "linear"]
