"""JSON as RFC 8259 has it, from an untrusted text: no NaN, no key twice, no depth that fills the stack."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from rewards.calls import unescaped

MAX_CHARACTERS = 2_000_000


_PYTHON = re.compile(
    r"\"(?:[^\"\\]|\\.)*+\"|'(?P<text>(?:[^'\\]|\\.)*+)'|\b(?P<name>True|False|None)\b|(?<![\w.])(?P<zeros>0+)(?=\d)",
    re.DOTALL,
)


class NotJson:
    """What a text holds that is not JSON."""


NOT_JSON = NotJson()


def read_json(text: str) -> Any:
    """Return what a JSON text holds, or NOT_JSON.

    >>> read_json('{"a": [1, null]}'), read_json("{'a': 1}") is NOT_JSON
    ({'a': [1, None]}, True)
    """
    if len(text) > MAX_CHARACTERS:
        return NOT_JSON
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        return NOT_JSON


def read_literal(text: str) -> Any:
    """Return what a text holds in JSON or in Python's spelling of it, or NOT_JSON. Nothing is evaluated.

    >>> read_literal("{'a': [007, True, None]}"), read_literal("{'a': f()}") is NOT_JSON
    ({'a': [7, True, None]}, True)
    """
    content = read_json(text)
    if content is NOT_JSON and len(text) <= MAX_CHARACTERS:
        return read_json(_PYTHON.sub(_spelled_as_json, text))
    return content


def _spelled_as_json(found: re.Match[str]) -> str:
    if found["text"] is not None:
        return json.dumps(unescaped(found["text"]))
    if found["name"] is not None:
        return {"True": "true", "False": "false", "None": "null"}[found["name"]]
    return "" if found["zeros"] is not None else found[0]


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
