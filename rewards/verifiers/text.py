"""vqa, general, multi_image, spatial, long_document and the subjects: short answers in words.

In this order: equal texts; options of a multiple choice, by letter or content; closed sets such as yes and no, left and
right; dates; numbers with their units; places in a list, such as "image 2" where multi_image wants "2"; for spatial,
the numbers of a point or a box. Each decides both ways. Then, one way: the same formula; the same letters ("e-mail" and
"email"); 0 for an answer that leaves open whether it is right ("Paris or London"). Anything else is for a judge.

`tolerance` is the greatest difference of two numbers, as a share of the reference: 0 wants them equal. `options` lists
the options, as texts in order or by letter; without, those that the question lists.

For biology, a genotype such as "AaBb" is right in its case alone.

Reasons: equal, closed_set, date, number, option, option_content, coordinates, genotype, formula, letters, hedged,
empty, too_long. A judge is asked for: text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rewards import choices, closed_sets, short_numbers
from rewards.choices import MAX_SHORT_CHARACTERS, NO_OPTIONS
from rewards.dates import Date, date_in
from rewards.equality import Rules, compare_answers, is_numeric
from rewards.notation import tidy
from rewards.plain_text import half_width, plain, trimmed
from rewards.verdict import Ask, Item, Outcome, RewardError, Verdict
from rewards.verifier import check_settings, setting

MAX_CHARACTERS = 20_000  # a longer answer is none

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
POINTING = frozenset({"spatial"})  # whose answers may be points and boxes
GENETIC = frozenset({"biology"})  # whose answers may be genotypes
_GENOTYPE = re.compile(r"(?:([A-Za-z])(?i:\1)){1,8}")  # "AaBb"
MAX_FORMULA = 200  # characters
_OPERATOR = re.compile(r"[\\+*/^=<>≤≥√π∞°|(²³½]|-(?=[\w(])|\de\d|[–−×·÷]")
_PROSE = re.compile(r"(?<!\\)\b(?!sin|cos|tan|cot|sec|csc|arc|log|exp|abs|sqrt|asin|acos|atan)[A-Za-z]{3}")
_ONLY_MATHEMATICAL = re.compile(r"[\\^√π]")
_NOT_FORMULA = re.compile(r"\d[\d\s.]*[/:-][\d\s./:-]*|.*[,;].*", re.DOTALL)  # "2010-2015" is a range, not -5
_BETWEEN_LETTERS = re.compile(r"[\s.\-'\"·]")
_PREPOSITION = re.compile(r"^(?:on|in|see)\s+", re.IGNORECASE)
_DIGIT = re.compile(r"\d")
_OR = re.compile(r"\s*(?:,\s*)?\bor\b\s*|(?<=[^\W\d])\s*/\s*(?=[^\W\d])|\s*或者?\s*")
_BRACKET = re.compile(r"[\[({<]")
SUBJECTS = ("biology", "geography", "history", "liberal_arts")
NAMES = ("vqa", "general", "multi_image", "spatial", "long_document", *SUBJECTS)


class Text:
    """A short answer: decided by rule where the reference is of a kind that rules know."""

    settings: Mapping[str, Any] = {"tolerance": 0.0, "options": None}

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, item: Item) -> None:
        check_settings(self, item)
        if not plain(item.reference):
            raise RewardError(f"{self.name}: the reference is empty")

    def check_values(self, item: Item) -> None:
        choices.of_setting(setting(self, item, "options"))

    def score(self, answer: str, item: Item) -> Outcome:
        if len(answer) > MAX_CHARACTERS:
            return Verdict(0.0, "too_long")
        if self.name in POINTING and (
            same := _as_coordinates(answer, item.reference, setting(self, item, "tolerance"))
        ):
            return same
        if self.name in GENETIC and (same := _as_genotype(answer, item.reference)):
            return same
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
    if len(given) > MAX_SHORT_CHARACTERS or len(wanted) > MAX_SHORT_CHARACTERS:
        return Ask("text")
    if numbered:
        answer, reference = (_bare_number(text, numbered) for text in (answer, reference))
    chosen = choices.decide(choices.capital(answer), choices.capital(reference), known, _same_text)
    if isinstance(chosen, Verdict):
        return chosen
    decision = _in_closed_set(answer, reference)
    if decision is not None:
        return Verdict(float(decision), "closed_set")
    right, said = date_in(reference), date_in(answer)
    if right and said:
        return Verdict(float(right == said), "date") if right == said or _contradicts(said, right) else Ask("text")
    decision = _as_numbers(answer, reference, tolerance)
    if decision is None and numbered:
        decision = _as_list(answer, reference)
    if decision is not None:
        return Verdict(float(decision), "number")
    return _as_formula(answer, reference, tolerance) or _as_letters(given, wanted, tolerance)


def _contradicts(one: Date, other: Date) -> bool:
    """Return whether two dates differ in a part that both have."""
    return any(a and b and a != b for a, b in zip(one, other, strict=True))


def _same_text(one: str, other: str) -> bool:
    return plain(one) == plain(other)


def _in_closed_set(answer: str, reference: str) -> bool | None:
    wanted = closed_sets.values_in(reference)
    given = closed_sets.values_in(answer) if wanted else None
    return closed_sets.decide(given, wanted) if given and wanted else None


def _as_numbers(answer: str, reference: str, tolerance: float) -> bool | None:
    wanted = short_numbers.short_number(reference)
    given = short_numbers.short_number(answer) if wanted else None
    return short_numbers.decide(given, wanted, tolerance) if given and wanted else None


def _as_formula(answer: str, reference: str, tolerance: float) -> Outcome | None:
    r"""Decide "x + 1" for "1 + x", and values such as \frac{1}{2}; None where one of both is no formula."""
    if len(answer) > MAX_FORMULA or len(reference) > MAX_FORMULA:
        return None
    if not _OPERATOR.search(answer + reference) or _PROSE.search(answer) or _PROSE.search(reference):
        return None
    given, wanted = tidy(answer), tidy(reference)
    if any(_NOT_FORMULA.fullmatch(text) for text in (given, wanted)):
        return None
    said = compare_answers(given, wanted, Rules(tolerance=max(tolerance, 1e-6))).answer
    if said == "same":
        return Verdict(1.0, "formula")
    values = said == "different" and _ONLY_MATHEMATICAL.search(given + wanted)
    return Verdict(0.0, "formula") if values and is_numeric(given) and is_numeric(wanted) else None


def _as_letters(given: str, wanted: str, tolerance: float) -> Outcome:
    """Decide texts that differ in hyphens, stops and space alone, and answers that name the reference among others."""
    if (
        not _DIGIT.search(wanted)
        and _BETWEEN_LETTERS.sub("", given) == (bare := _BETWEEN_LETTERS.sub("", wanted))
        and bare
    ):
        return Verdict(1.0, "letters")
    parts = [part for part in _OR.split(given.removeprefix("either ")) if part]
    several = len(parts) > 1 and not _OR.search(wanted)
    if several and any(part == wanted or _as_numbers(part, wanted, tolerance) for part in map(plain, parts)):
        return Verdict(0.0, "hedged")
    return Ask("text")


def _as_genotype(answer: str, reference: str) -> Outcome | None:
    """Decide genotypes of the same letters, whose case is what they say; None where one of both is none."""
    given, wanted = trimmed(answer), trimmed(reference)
    if not (_GENOTYPE.fullmatch(given) and _GENOTYPE.fullmatch(wanted)) or given.casefold() != wanted.casefold():
        return None
    return Verdict(float(given == wanted), "genotype")


def _as_coordinates(answer: str, reference: str, tolerance: float) -> Outcome | None:
    """Decide the numbers of a point or a box, whatever its brackets; None where one of both is neither."""
    wanted = _coordinates(reference) if _BRACKET.search(reference) else None
    given = _coordinates(answer) if wanted else None
    if not given or not wanted:
        return None
    near = len(given) == len(wanted) and all(
        abs(a - b) <= max(tolerance, 1e-6) * abs(b) for a, b in zip(given, wanted, strict=True)
    )
    return Verdict(float(near), "coordinates")


def _coordinates(text: str) -> list[float]:
    """Return the two or more numbers of "[[1, 2], [3, 4]]" or "(1, 2)"; [] for any other text."""
    bare = half_width(text).strip(" .") if len(text) <= MAX_SHORT_CHARACTERS else ""
    parts = [part for part in re.split(r"[\s,\[\](){}<>]+", bare) if part]
    fits = len(parts) > 1 and all(re.fullmatch(r"-?\d{1,9}(?:\.\d{1,9})?", part) for part in parts)
    return [float(part) for part in parts] if fits else []


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
    noun = rf"(?<![^\W\d_])(?:{nouns})(?![^\W\d_])\.?|(?:{nouns})(?=[一二三四五六七八九十])"
    around = rf"{noun}|[#第]|\b(?:number|no\.?)(?=\s*\d)"
    bare = re.sub(around, " ", _PREPOSITION.sub("", trimmed(text), count=1), flags=re.IGNORECASE)
    bare = re.sub(r"\b(\d{1,6})(?:st|nd|rd|th)\b", r"\1", bare)
    words = [str(ORDINALS.get(word.casefold(), word)) for word in bare.split()]
    return trimmed(" ".join(words)) or text
