"""Constraints on the form of a text, as an instruction states them, written as JSON.

    [{"rule": "words", "at_least": 50, "at_most": 100},       also sentences, paragraphs, lines, bullets, characters
     {"rule": "bullets", "exactly": 3},
     {"rule": "contains", "text": "tower", "at_least": 2},    without case, unless "ignore_case": false
     {"rule": "excludes", "text": "sorry"},
     {"rule": "starts_with", "text": "Dear"}, {"rule": "ends_with", "text": "Yours."},
     {"rule": "case", "is": "upper"},                         or lower: every letter that has case
     {"rule": "json"},                                        the whole text, fenced or not
     {"rule": "script", "is": "latin", "share": 0.9}]         of the letters; or han, kana, hangul, cyrillic, arabic ...

A word is a run of letters and digits (with ' and - inside), or one Chinese or Japanese character. A sentence ends with
. ! ? … or their Chinese forms, a paragraph with an empty line. A bullet is a line that begins with -, *, +, • or 1.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from common.nearest import suggestion
from rewards.plain_text import composed
from rewards.source_code import without_fence
from rewards.strict_json import NOT_JSON, read_json
from rewards.verdict import RewardError

Constraint: TypeAlias = Mapping[str, Any]

MAX_CONSTRAINTS = 100
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W_{_IDEOGRAPH}]+(?:['’-][^\W_{_IDEOGRAPH}]+)*")
# (?<!...) and ++: a run of stops is looked at once, not again from each of its stops
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*+(?=\s|$)|[。！？]+[”’」）]*")
_BULLET = re.compile(r"^[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
_PARAGRAPH_END = re.compile(r"\n[ \t]*\n\s*")
_SCRIPTS = {"latin": ("LATIN",), "han": ("CJK",), "kana": ("HIRAGANA", "KATAKANA"), "hangul": ("HANGUL",)} | {
    name: (name.upper(),) for name in ("cyrillic", "greek", "arabic", "hebrew", "devanagari", "thai")
}
MAX_CHARACTERS_OF_SCRIPT = 20_000  # letters that are looked at


def words(text: str) -> int:
    return sum(1 for _ in _WORD.finditer(text))


def sentences(text: str) -> int:
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    rest = text[ends[-1] :] if ends else text
    return len(ends) + bool(_WORD.search(rest))


def paragraphs(text: str) -> int:
    return sum(1 for part in _PARAGRAPH_END.split(text) if part.strip())


def lines(text: str) -> int:
    return sum(1 for line in text.splitlines() if line.strip())


def bullets(text: str) -> int:
    return sum(1 for _ in _BULLET.finditer(text))


COUNTS: Mapping[str, Callable[[str], int]] = {
    "words": words,
    "sentences": sentences,
    "paragraphs": paragraphs,
    "lines": lines,
    "bullets": bullets,
    "characters": len,
}


def met(text: str, constraint: Constraint) -> bool:
    """Return whether a text meets a constraint that `read` has checked."""
    return RULES[constraint["rule"]].met(composed(text.strip()), constraint)


def read(text: str) -> list[Constraint]:
    """Read constraints, and check them.

    Raises:
        RewardError: The text is not a JSON list of constraints with the keys and values of their rules.
    """
    constraints = read_json(text)
    if not isinstance(constraints, list) or not 0 < len(constraints) <= MAX_CONSTRAINTS:
        raise RewardError(
            f"instruction: the reference is {text[:100]!r}, not a JSON list of 1 to {MAX_CONSTRAINTS} constraints"
        )
    for constraint in constraints:
        if not isinstance(constraint, dict) or not isinstance(constraint.get("rule"), str):
            raise RewardError(f"instruction: {constraint!r} is not a JSON object with a rule")
        _check(constraint)
    return constraints


def _check(constraint: Constraint) -> None:
    rule = constraint["rule"]
    if rule not in RULES:
        hint = suggestion(rule, RULES) or f": the rules are {', '.join(RULES)}"
        raise RewardError(f"instruction: there is no rule {rule!r}{hint}")
    known = RULES[rule]
    for key in known.required:
        if key not in constraint:
            raise RewardError(f"instruction: the rule {rule} needs {key}")
    for key, value in constraint.items():
        if key != "rule" and key not in (*known.required, *known.optional):
            keys = ", ".join((*known.required, *known.optional)) or "none"
            raise RewardError(f"instruction: the rule {rule} has no key {key!r}; it has {keys}")
        if key != "rule" and not KEYS[key](value, rule):
            raise RewardError(f"instruction: {key} of the rule {rule} is {value!r}")
    if rule in COUNTS and len(constraint) == 1:
        raise RewardError(f"instruction: the rule {rule} needs one of {', '.join(known.optional)}")


def _in_range(count: int, constraint: Constraint) -> bool:
    least = constraint.get("exactly", constraint.get("at_least", 0))
    most = constraint.get("exactly", constraint.get("at_most", count))
    return bool(least <= count <= most)


def _counted(count: Callable[[str], int]) -> Callable[[str, Constraint], bool]:
    return lambda text, constraint: _in_range(count(text), constraint)


def _pair(text: str, constraint: Constraint) -> tuple[str, str]:
    """Return the text and what it is compared with, without case unless the constraint says so."""
    wanted = composed(constraint["text"])
    return (text.casefold(), wanted.casefold()) if constraint.get("ignore_case", True) else (text, wanted)


def _contains(text: str, constraint: Constraint) -> bool:
    text, wanted = _pair(text, constraint)
    return _in_range(text.count(wanted), {"at_least": 1, **constraint})


def _excludes(text: str, constraint: Constraint) -> bool:
    text, unwanted = _pair(text, constraint)
    return unwanted not in text


def _starts_with(text: str, constraint: Constraint) -> bool:
    text, wanted = _pair(text, constraint)
    return text.startswith(wanted)


def _ends_with(text: str, constraint: Constraint) -> bool:
    text, wanted = _pair(text, constraint)
    return text.endswith(wanted)


def _case(text: str, constraint: Constraint) -> bool:
    return text.isupper() if constraint["is"] == "upper" else text.islower()


def _json(text: str, constraint: Constraint) -> bool:
    return read_json(without_fence(text)) is not NOT_JSON


def _script(text: str, constraint: Constraint) -> bool:
    letters = [character for character in text[:MAX_CHARACTERS_OF_SCRIPT] if character.isalpha()]
    names = _SCRIPTS[constraint["is"]]
    in_script = sum(unicodedata.name(letter, "").startswith(names) for letter in letters)
    return bool(letters) and in_script >= constraint.get("share", 0.9) * len(letters)


@dataclass(frozen=True)
class Rule:
    """How a rule decides, and the keys of its constraints."""

    met: Callable[[str, Constraint], bool]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


RULES: Mapping[str, Rule] = {
    **{name: Rule(_counted(count), (), ("exactly", "at_least", "at_most")) for name, count in COUNTS.items()},
    "contains": Rule(_contains, ("text",), ("at_least", "at_most", "exactly", "ignore_case")),
    "excludes": Rule(_excludes, ("text",), ("ignore_case",)),
    "starts_with": Rule(_starts_with, ("text",), ("ignore_case",)),
    "ends_with": Rule(_ends_with, ("text",), ("ignore_case",)),
    "case": Rule(_case, ("is",)),
    "json": Rule(_json),
    "script": Rule(_script, ("is",), ("share",)),
}


def _is_count(value: Any, rule: str) -> bool:
    return type(value) is int and value >= 0


# key -> whether a value may stand there
KEYS: Mapping[str, Callable[[Any, str], bool]] = {
    "exactly": _is_count,
    "at_least": _is_count,
    "at_most": _is_count,
    "text": lambda value, rule: isinstance(value, str) and bool(value.strip()),
    "ignore_case": lambda value, rule: isinstance(value, bool),
    "is": lambda value, rule: value in (_SCRIPTS if rule == "script" else ("upper", "lower")),
    "share": lambda value, rule: type(value) in (int, float) and 0 < value <= 1,
}
