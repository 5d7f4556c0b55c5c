"""counting: a whole number, in digits or in English or Chinese words, alone or with the noun that is counted.

    "7"  "7.0"  "[7]"  "**7**"  "seven"  "七个"                             7
    "7 apples"  "apples: 7"  "There are seven apples."  "3 + 4 = 7"         7
    "6 or 7"  "about 7"  "7+"  "5-9"                                        0: hedged
    "many"                                                                  0: no_number
    "3 red and 4 blue"                                                      a judge is asked

Reasons: number, different, hedged, no_number, not_whole, too_long.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rewards.notation import tidy
from rewards.quantity import real
from rewards.verdict import Ask, Item, Outcome, RewardError, Verdict
from rewards.verifier import check_settings
from rewards.words import CHINESE_NUMBER, HEDGE, NUMBER_WORDS, chinese_number, english_number, word_number

_MAX_CHARACTERS = 200
_DIGITS = re.compile(r"(?<![A-Za-z0-9_.])-?\d+(?:,\d{3})*(?:\.\d+)?(?![\d.]*\d)")
_WORDS = re.compile(
    rf"\b(?:(?:a|an)\s+)?(?:{'|'.join(sorted(NUMBER_WORDS, key=len, reverse=True))})"
    rf"(?:(?:[\s-]+(?:and\s+)?)(?:{'|'.join(sorted(NUMBER_WORDS, key=len, reverse=True))}))*\b",
    re.IGNORECASE,
)
_NOT_ANY = re.compile(r"(?:there (?:is|are) )?(?:no|none|not any)(?: [a-z]+){0,3}|没有.{0,6}|无", re.IGNORECASE)


_BRACKETED = re.compile(r"[\[({⦃]([^\[\](){}⦃⦄]*)[\])}⦄]")
_SUM = re.compile(r"\d{1,6}(?:\s*\+\s*\d{1,6})+\s*=\s*(\d{1,7})")


class Counting:
    """Compares whole numbers."""

    name = "counting"
    settings: Mapping[str, Any] = {}

    def check(self, item: Item) -> None:
        check_settings(self, item)
        number = _whole(item.reference)
        if number is None or number < 0 or _is_open(item.reference):
            raise RewardError(f"counting: the reference {item.reference[:50]!r} is no whole number, or leaves it open")

    def score(self, answer: str, item: Item) -> Outcome:
        wanted = _whole(item.reference)
        if len(answer) > _MAX_CHARACTERS:
            return Verdict(0.0, "too_long")
        given = _bare(tidy(answer))
        if (number := _alone(given)) is None:
            return _in_prose(given, wanted)
        if number != int(number):
            return Verdict(0.0, "not_whole")
        return _verdict(number, wanted)


def _bare(text: str) -> str:
    """Return "7" for "[7]" and for "3 + 4 = 7"."""
    if (bracketed := _BRACKETED.fullmatch(text)) or (bracketed := _SUM.fullmatch(text)):
        return bracketed[1].strip()
    return text


def _verdict(number: float, wanted: float | None) -> Verdict:
    return Verdict(1.0, "number") if number == wanted else Verdict(0.0, "different")


def _whole(reference: str) -> float | None:
    """Return the number of a reference, or None if it is not whole."""
    number = _alone(tidy(reference))
    if number is None and len(found := _numbers(tidy(reference))) == 1:
        number = found[0]
    return number if number is not None and number == int(number) else None


def _is_open(reference: str) -> bool:
    """Return whether a reference is a hedge, as "about 7": no answer would be right."""
    text = _bare(tidy(reference))
    return _alone(text) is None and HEDGE.search(text) is not None


def _alone(text: str) -> float | None:
    """Return the number that a text is, and nothing besides."""
    if re.fullmatch(r"[-+]?[\d][\d, ]*(?:\.\d*)?", text):
        return real(text)
    said = word_number(text)
    return None if said is None else float(said)


def _in_prose(text: str, wanted: float | None) -> Outcome:
    if _NOT_ANY.fullmatch(text):
        return _verdict(0.0, wanted)
    numbers = _numbers(text.replace("一共", "共"))  # "in all", not one
    if not numbers:
        return Verdict(0.0, "no_number")
    if HEDGE.search(text) or (len(_DIGITS.findall(text)) > 1 and not re.search("[^\\W\\d]", text)):
        return Verdict(0.0, "hedged")
    if len(numbers) > 1:
        return Ask("several_numbers")
    if numbers[0] != int(numbers[0]):
        return Verdict(0.0, "not_whole")
    if re.search(r"[^\w\s,.:='’()%\-]", text) or re.search(r"%|\d[A-Za-z]|\w\(", text):  # code, formulas, 7x
        return Verdict(0.0, "no_number")
    return _verdict(numbers[0], wanted)


def _numbers(text: str) -> list[float]:
    """Return the numbers in a text: of "7 (seven)" one, of "3 red and 4 blue" two."""
    found: list[float] = []
    for pattern, meaning in ((_DIGITS, real), (_WORDS, english_number), (CHINESE_NUMBER, chinese_number)):
        for match in pattern.finditer(text):
            number = meaning(match[0])
            if number is not None and float(number) not in found:
                found.append(float(number))
    return found
