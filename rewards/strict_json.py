"""JSON as RFC 8259 has it, from an untrusted text: no NaN, no key twice, no depth that fills the stack."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_LETTERS = 2_000_000


class NotJson:
    """What a text holds that is not JSON."""


NOT_JSON = NotJson()


def read_json(text: str) -> Any:
    """Return what a JSON text holds, or NOT_JSON.

    >>> read_json('{"a": [1, null]}'), read_json("{'a': 1}") is NOT_JSON
    ({'a': [1, None]}, True)
    """
    if len(text) > MAX_LETTERS:
        return NOT_JSON
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        return NOT_JSON


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is too large")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result
