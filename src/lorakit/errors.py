"""The one kind of error lorakit raises on purpose: it names the thing, the place and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LorakitError(ValueError):
    """What is wrong, where, and how to mend it, in one text. The command line prints it and exits with 1."""


def near(name: str, options: Iterable[str], n: int = 3, listing: bool = True) -> str:
    """'; did you mean `x` or `y`?' with the options nearest to `name`; if none is near, the whole list where it is short (`listing`)."""
    every = list(dict.fromkeys(options))
    hits = difflib.get_close_matches(name, every, n, 0.55) or [o for o in every if name and (name in o or o in name)][:n]
    if hits:
        return f"; did you mean {' or '.join(f'`{h}`' for h in hits)}?"
    return f"; known are {', '.join(every)}" if listing and 0 < len(every) <= 12 else ""


def extra(package: str, name: str) -> LorakitError:
    """The error for an optional dependency that is not installed."""
    return LorakitError(f"this needs the package `{package}`, which is not installed; mend: pip install 'lorakit[{name}]'")
