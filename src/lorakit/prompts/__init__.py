"""Learnt tokens in front of a model's input, or of every layer's keys and values: how a call is lengthened, what comes out shortened again."""

from lorakit.prompts.cache import prefilled
from lorakit.prompts.front import Prompted, lengthen, shorten
from lorakit.prompts.starts import check, linear

__all__ = ["Prompted", "check", "lengthen", "linear", "prefilled", "shorten"]
