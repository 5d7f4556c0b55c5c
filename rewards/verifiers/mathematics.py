"""math: numbers, expressions, sets, intervals, equations, options.

Rules, in order: the same text; an option's letter or content; yes and no; a quantity with its unit; what
`rewards.equality` compares; symbolic mathematics in a worker process for LaTeX that no rule reads (integrals, sums,
matrices). A reference that is a number wants a number: prose scores 0. Other texts are left to a judge.

Settings: tolerance (1e-6), ordered (false: the order of "1, 2" counts only where the question asks for one), options (a
list or mapping; without, those that the question lists).

Reasons of 1: equal, number, number_word, expression, equation, set, tuple, interval, option, option_content, truth,
quantity, symbolic. Of 0: different, option, option_content, truth, hedged, not_a_number, too_long, too_large,
time_limit, memory_limit. A judge is asked for: text, option, domain, number_with_words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rewards import choices, quantity
from rewards.equality import Rules, compare_answers, is_numeric
from rewards.notation import MAX_CHARACTERS, tidy
from rewards.symbolic import same_by_symbols
from rewards.verdict import Ask, Item, Outcome, RewardError, Verdict
from rewards.verifier import check_settings, setting
from rewards.words import HEDGE, leading_number, truth, word_number

_PERCENT = re.compile(r"%|\bper ?cent|百分", re.IGNORECASE)
_ORDER = re.compile(
    r"\border(?:ed)?\b|ascending|descending|increasing|decreasing|respectively|顺序|分别|从小到大|从大到小",
    re.IGNORECASE,
)
_LATEX = re.compile(r"\\[A-Za-z]+")
_PLAIN_NUMBER_AND_WORDS = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?%?\s+[A-Za-z][A-Za-z \-]*")
_WORDS = re.compile(r"[A-Za-z][A-Za-z \-]*")
_CURRENCY = re.compile(
    r"^\s*(?:[$€£¥]|USD|EUR|RMB)\s*(?=[-\d.])|(?<=\d)\s*(?:[€£元$]|dollars?|euros?|yuan|USD|EUR|RMB)$", re.IGNORECASE
)

_PREFACE = re.compile(
    r"^(?:(?:so )?(?:the |my )?(?:final |correct )?answer(?: is|:)?:?|=)\s*(?=\S)|^答案(?:是|为)?:?\s*",
    re.IGNORECASE,
)
_SCALED = re.compile(
    r"([-+]?\d[\d,]*(?:\.\d+)?)(?: (hundred|thousand|million|billion|trillion)s?| ?([百千]?[万亿]|千))", re.IGNORECASE
)

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)

_NO = Verdict(0.0, "different")


class Mathematics:
    """Compares answers in mathematics."""

    name = "math"
    settings: Mapping[str, Any] = {"tolerance": 1e-6, "ordered": False, "options": None}

    def check(self, item: Item) -> None:
        check_settings(self, item)
        if not tidy(item.reference):
            raise RewardError(f"{self.name}: the reference is empty")
        broken = "\\" in item.reference and not _braces_match(item.reference)
        if broken or _CONTROL.search(item.reference):
            raise RewardError(
                f"{self.name}: the reference {item.reference[:100]!r} has "
                + ("braces that do not match" if broken else "control characters")
            )
        if len(item.reference) > MAX_CHARACTERS:
            raise RewardError(
                f"{self.name}: the reference has {len(item.reference)} characters, more than {MAX_CHARACTERS}"
            )

    def check_values(self, item: Item) -> None:
        choices.of_setting(setting(self, item, "options"))

    def score(self, answer: str, item: Item) -> Outcome:
        if len(answer) > MAX_CHARACTERS:
            return Verdict(0.0, "too_long")
        given, wanted = _PREFACE.sub("", tidy(answer)), tidy(item.reference)
        if given == wanted:
            return Verdict(1.0, "equal")
        for rule in (self._option, _truth, self.measured, self._mathematics):
            if (outcome := rule(given, wanted, item)) is not None:
                return outcome
        if _LATEX.search(given) or _LATEX.search(wanted):
            return same_by_symbols(answer, item.reference) or (_NO if is_numeric(wanted) else Ask("text"))
        return _as_text(given, wanted)

    def rules(self, item: Item) -> Rules:
        """Return how strictly the answers to an item are compared."""
        return Rules(
            tolerance=float(setting(self, item, "tolerance")),
            ordered=bool(setting(self, item, "ordered") or _ORDER.search(item.question)),
            percent=bool(_PERCENT.search(item.question)),
        )

    def _option(self, given: str, wanted: str, item: Item) -> Outcome | None:
        """Decide multiple choice."""
        known = choices.of_setting(setting(self, item, "options")) or choices.of_question(item.question)
        if len(wanted) == 1 and wanted.islower() and not known:
            return None  # a variable
        return choices.decide(given, wanted, known, lambda one, other: self._same(tidy(one), tidy(other), item))

    def _same(self, given: str, wanted: str, item: Item) -> bool:
        if given.casefold() == wanted.casefold():
            return True
        return compare_answers(given, wanted, self.rules(item)).answer == "same"

    def measured(self, given: str, wanted: str, item: Item) -> Outcome | None:
        """Decide "5 cm" against "50 mm", and against "5": a unit that only one of them has is not required."""
        one, other = quantity.read(given), quantity.read(wanted)
        if one is None or other is None or (one.unit is None and other.unit is None):
            return None
        same = quantity.compare(one, other, self.rules(item).tolerance) in ("same", "unit_missing", "unit_added")
        return Verdict(1.0, "quantity") if same else _NO

    def _mathematics(self, given: str, wanted: str, item: Item) -> Outcome | None:
        rules = self.rules(item)
        given, wanted = _CURRENCY.sub("", given), _CURRENCY.sub("", wanted)
        said, rest = leading_number(wanted)
        wanted = str(said) if said and not rest else wanted
        result = compare_answers(given, wanted, rules)
        if result.answer in ("same", "different"):
            return Verdict(float(result.answer == "same"), result.rule if result.answer == "same" else "different")
        if result.rule == "domain":  # equal where all variables are positive
            return Ask("domain")
        if _LATEX.search(given) or _LATEX.search(wanted):
            return None
        return _number_in_words(given, wanted, rules) if is_numeric(wanted) or quantity.read(wanted) else None


def _braces_match(text: str) -> bool:
    """Return whether every brace of a text in LaTeX is closed. A brace behind a backslash is a sign."""
    depth = 0
    for brace in _BRACE.findall(text):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0


def _truth(given: str, wanted: str, item: Item) -> Outcome | None:
    """Decide yes and no, where the reference is a word for one of them."""
    right = truth(wanted) if len(wanted) > 1 else None
    said = truth(given)
    return None if right is None or said is None else Verdict(float(said == right), "truth")


def _number_in_words(given: str, wanted: str, rules: Rules) -> Outcome:
    """Decide prose where a number is wanted: number words count; a number among plain words is left to a judge."""
    if (said := word_number(given)) is not None:
        same = compare_answers(str(said), wanted, rules).answer == "same"
        return Verdict(float(same), "number_word" if same else "different")
    if scaled := _SCALED.fullmatch(given):
        product = f"({scaled[1]})*{word_number(scaled[2] or scaled[3])}"
        return Verdict(1.0, "number_word") if compare_answers(product, wanted, rules).answer == "same" else _NO
    if HEDGE.search(given):
        return Verdict(0.0, "hedged")
    number, rest = leading_number(given)
    if _PLAIN_NUMBER_AND_WORDS.fullmatch(given) or (number is not None and _WORDS.fullmatch(rest)):
        digits = given.split()[0] if number is None else str(number)
        return Ask("number_with_words") if compare_answers(digits, wanted, rules).answer == "same" else _NO
    return Verdict(0.0, "not_a_number")


def _as_text(given: str, wanted: str) -> Outcome:
    if given.casefold() == wanted.casefold() and len(wanted) > 1:
        return Verdict(1.0, "equal")
    return Ask("text")
