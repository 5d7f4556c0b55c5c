"""Find what a user probably meant by a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like `name`, or None if none is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ": did you mean NAME?", or an empty string if no known name is near. For the end of an error message."""
    near = nearest(name, known)
    return f": did you mean {near}?" if near else ""
