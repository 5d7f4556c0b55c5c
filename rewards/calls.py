r"""Calls with named arguments in an answer, such as `left_click(start_box='[500,500]', element_info='OK')`.

    call       name ( argument , ... )    or a name alone
    argument   name = 'text' | "text" | whole number

They are read, never executed. A quote in a text is written \\', a line break \\n.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_CHARACTERS = 20_000
_NAME = re.compile(r"\s*([A-Za-z_]\w{0,40})\s*")
_ARGUMENT = re.compile(
    r"\s*([A-Za-z_]\w{0,40})\s*=\s*(?:'((?:[^'\\]|\\.)*+)'|\"((?:[^\"\\]|\\.)*+)\"|(-?\d{1,9}))\s*", re.DOTALL
)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "'": "'", '"': '"', "\\": "\\"}


@dataclass(frozen=True)
class Call:
    """A name and its arguments."""

    name: str
    arguments: dict[str, str | int]


def read_call(text: str) -> Call | None:
    """Return the call that a text is; None if it is anything else, or names an argument twice."""
    found = _NAME.match(text) if len(text) <= MAX_CHARACTERS else None
    if found is None:
        return None
    name, at = found[1], found.end()
    if at == len(text):
        return Call(name, {})
    if text[at] != "(" or not text.rstrip().endswith(")"):
        return None
    arguments: dict[str, str | int] = {}
    at, end = at + 1, len(text.rstrip()) - 1
    if not text[at:end].strip():
        return Call(name, {})
    while argument := _ARGUMENT.match(text, at, end):
        if argument[1] in arguments:
            return None
        arguments[argument[1]] = _value(argument)
        if argument.end() == end:
            return Call(name, arguments)
        if text[argument.end()] != ",":
            return None
        at = argument.end() + 1
    return None


def _value(argument: re.Match[str]) -> str | int:
    if argument[4] is not None:
        return int(argument[4])
    return unescaped(argument[2] if argument[2] is not None else argument[3])


def unescaped(text: str) -> str:
    r"""Return what a text between quotes says: a quote for \', a line break for \n."""
    return _ESCAPE.sub(lambda found: _ESCAPED.get(found[1], found[0]), text)
