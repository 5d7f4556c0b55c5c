"""vqa, general, multi_image, spatial, long_document and the subjects: short answers in words.

In this order: equal texts; closed sets such as yes and no, left and right; numbers with their units; options of a
multiple choice, by letter or content; places in a list, such as "image 2" where multi_image wants "2". Each decides
both ways. Anything else is for a judge.

`tolerance` is the greatest difference of two numbers, as a share of the reference: 0 wants them equal. `options` lists
the options, as texts in order or by letter; without, those that the question lists.

Reasons: equal, closed_set, number, option, empty, too_long. A judge is asked for: text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rewards import choices, closed_sets, short_numbers
from rewards.plain_text import plain, trimmed
from rewards.verdict import Ask, Item, Outcome, RewardError, Verdict
from rewards.verifier import check_settings, setting

MAX_LETTERS = 20_000  # a longer answer is none
SHORT = 500  # letters up to which the rules of short answers are tried

ORDINALS = {
    word: number
    for number, word in enumerate(
        ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"), 1
    )
}
# What a verifier's answers may number: "image 2" is 2.
NUMBERED = {
    "multi_image": r"images?|pic(?:ture)?s?|photos?|photographs?|figures?|panels?|img|fig|图片|图像|图|张|幅",
    "long_document": r"pages?|p|页",
}
SUBJECTS = ("biology", "geography", "history", "liberal_arts")
NO_OPTIONS: Mapping[str, str] = MappingProxyType({})
NAMES = ("vqa", "general", "multi_image", "spatial", "long_document", *SUBJECTS)


class Text:
    """A short answer: decided by rule where the reference is of a kind that rules know."""

    settings: Mapping[str, Any] = {"tolerance": 0.0, "options": None}

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, item: Item) -> None:
        check_settings(self, item)
        if not item.reference.strip():
            raise RewardError(f"{self.name}: the reference is empty")
        choices.of_setting(setting(self, item, "options"))
        if not 0 <= setting(self, item, "tolerance") < 1:
            raise RewardError(
                f"{self.name}: the setting tolerance is {item.settings['tolerance']}, not from 0 to below 1"
            )

    def score(self, answer: str, item: Item) -> Outcome:
        if len(answer) > MAX_LETTERS:
            return Verdict(0.0, "too_long")
        numbered = NUMBERED.get(self.name, "")
        known = choices.of_setting(setting(self, item, "options")) or choices.of_question(item.question)
        return compare(answer, item.reference, known, setting(self, item, "tolerance"), numbered)


def compare(
    answer: str,
    reference: str,
    known: Mapping[str, str] = NO_OPTIONS,
    tolerance: float = 0.0,
    numbered: str = "",
) -> Outcome:
    """Return what the rules say of an answer.

    Args:
        answer: What was answered.
        reference: What is right.
        known: The options of a multiple choice, by letter.
        tolerance: The greatest difference of two numbers, as a share of the reference.
        numbered: A regular expression of the nouns that may stand with a number: "image 2" for "2".
    """
    given, wanted = plain(answer), plain(reference)
    if not given:
        return Verdict(0.0, "empty")
    if given == wanted:
        return Verdict(1.0, "equal")
    if len(given) > SHORT or len(wanted) > SHORT:
        return Ask("text")
    if numbered:
        answer, reference = (_bare_number(text, numbered) for text in (answer, reference))
    decision = choices.decide(answer, reference, known)
    if decision is not None:
        return Verdict(float(decision), "option")
    decision = _in_closed_set(answer, reference)
    if decision is not None:
        return Verdict(float(decision), "closed_set")
    decision = _as_numbers(answer, reference, tolerance)
    if decision is None and numbered:
        decision = _as_list(answer, reference)
    return Ask("text") if decision is None else Verdict(float(decision), "number")


def _in_closed_set(answer: str, reference: str) -> bool | None:
    wanted = closed_sets.values_in(reference)
    given = closed_sets.values_in(answer) if wanted else None
    return closed_sets.decide(given, wanted) if given and wanted else None


def _as_numbers(answer: str, reference: str, tolerance: float) -> bool | None:
    wanted = short_numbers.short_number(reference)
    given = short_numbers.short_number(answer) if wanted else None
    return short_numbers.decide(given, wanted, tolerance) if given and wanted else None


def _as_list(answer: str, reference: str) -> bool | None:
    """Return whether two lists of numbers agree; None for the same numbers in another order."""
    given, wanted = ([int(number) for number in _numbers(text)] for text in (answer, reference))
    if not given or not wanted:
        return None
    return True if given == wanted else (None if sorted(given) == sorted(wanted) else False)


def _numbers(text: str) -> list[str]:
    """Return the numbers of "1, 2 and 3"; [] for any other text."""
    parts = re.split(r"\s*(?:,|;|&|、|\band\b|和)\s*|\s+", text.strip(" ()[]."))
    parts = [part for part in parts if part]
    return parts if all(re.fullmatch(r"\d{1,6}", part) for part in parts) else []


def _bare_number(text: str, nouns: str) -> str:
    """Write "the second image", "Image #2" and "第2张图" as "2"; other texts without the nouns."""
    around = rf"(?<![^\W\d_])(?:{nouns})(?![^\W\d_])\.?|[#第]|\b(?:number|no\.?)(?=\s*\d)"
    bare = re.sub(around, " ", trimmed(text), flags=re.IGNORECASE)
    bare = re.sub(r"\b(\d{1,6})(?:st|nd|rd|th)\b", r"\1", bare)
    words = [str(ORDINALS.get(word.casefold(), word)) for word in bare.split()]
    return trimmed(" ".join(words)) or text
