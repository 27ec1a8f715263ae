"""Learnt tokens in front of a model's input: how a call is lengthened and what comes out of it shortened again."""

from lorakit.prompts.front import Prompted, lengthen, shorten

__all__ = ["Prompted", "lengthen", "shorten"]
