"""chart: numbers within 2.5 %, years exact where the question asks for one, yes and no, labels, lists in any order.

    "$1.2 million" and "1200000"                              the same
    "12.5%" and "12.5", where the question asks for per cent  the same
    "2015" and "2014", asked "In which year?"                 different; so if no question says what is asked for
    "€5" and "$5"                                             different
    "1.2" and "1.2 million", asked "in millions"              the same
    "A, B" and "B, A"                                         the same, unless the question asks for an order

Settings: tolerance (0.025), ordered, options. Reasons beside those of math: year, list, incomplete, and for labels
those of `rewards.verifiers.text`; a judge is asked for: list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rewards import choices
from rewards.equality import Rules
from rewards.evaluate import close
from rewards.notation import MAX_CHARACTERS, tidy
from rewards.plain_text import plain
from rewards.quantity import read as read_quantity
from rewards.quantity import real
from rewards.short_numbers import CURRENCIES
from rewards.verdict import Ask, Item, Outcome, Verdict
from rewards.verifiers.mathematics import Mathematics
from rewards.verifiers.text import compare
from rewards.words import HEDGE, truth, word_number

_SCALES = {
    **dict.fromkeys(("hundred",), 1e2),
    **dict.fromkeys(("thousand", "thousands", "k", "K", "千"), 1e3),
    "万": 1e4,
    **dict.fromkeys(("million", "millions", "mn", "mln", "m", "M", "mio", "百万"), 1e6),
    **dict.fromkeys(("billion", "billions", "bn", "b", "B", "十亿"), 1e9),
    "亿": 1e8,
    **dict.fromkeys(("trillion", "trillions", "tn", "T"), 1e12),
}
_AMOUNT = re.compile(
    r"(?P<sign>[-+]?)\s*(?:US\s?)?[$€£¥₹]?\s*"
    r"(?P<number>[-+]?(?:\d[\d, ]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?|\d+\s*/\s*\d+)"
    rf"\s*(?P<scale>{'|'.join(sorted(_SCALES, key=len, reverse=True))})?(?![A-Za-z])\s*"
    r"(?P<percent>%|per ?cent|percentage points|pp)?\s*"
    r"(?:[$€£¥元]|dollars?|euros?|pounds?|yuan|USD|EUR|RMB|people|units?|times|倍|人|个)?"
)
_CURRENCIES = {**CURRENCIES, "₹": "rupee", "元": "yuan", "USD": "dollar", "EUR": "euro", "RMB": "yuan"}
_CURRENCY = re.compile(r"[$€£¥₹元]|USD|EUR|RMB|\b(?:dollar|euro|pound|yuan)(?=s?\b)")
_YEAR_ASKED = re.compile(
    r"\b(?:which|what|name the|list the) (?:\w+ ){0,2}years?\b|^\W*(?:the )?years?\b|\bwhen\b"
    r"|\byears? (?:did|does|do|was|were|is|are|has|had|with|when|in which|that)\b|[哪何]\S{0,3}年|什么年|年份",
    re.IGNORECASE,
)
_AMOUNT_ASKED = re.compile(r"\bhow (?:many|much)\b|多少(?!年)", re.IGNORECASE)
_LABEL_ASKED = re.compile(r"\bwhich\b|\blabels?\b|[哪何]", re.IGNORECASE)
_VALUE_ASKED = re.compile(r"\b(?:values?|numbers?|amounts?|figures?|totals?|prices?|sales)\b|[值量数额]", re.IGNORECASE)
_SCALE_ASKED = re.compile(r"\bin (thousand|million|billion|trillion)s?\b", re.IGNORECASE)
_YEAR = re.compile(r"(?:in |the year |in the year |year )?([12]\d{3})\s*年?", re.IGNORECASE)
_RANGE = re.compile(r"\d[\d,.]*\s*-\s*\d")  # "2010-2015" is no difference
_MAX_LABELS = 60


@dataclass(frozen=True)
class Amount:
    """A number as charts write it."""

    number: float  # as written
    scale: float = 1.0  # a million in "1.2 million"
    scale_word: str = ""
    percent: bool = False

    @property
    def value(self) -> float:
        return self.number * self.scale / (100 if self.percent else 1)


class Chart(Mathematics):
    """Compares values and labels of charts."""

    name = "chart"
    settings: Mapping[str, Any] = {**Mathematics.settings, "tolerance": 0.025}

    def score(self, answer: str, item: Item) -> Outcome:
        if len(answer) > MAX_CHARACTERS:
            return Verdict(0.0, "too_long")
        given, wanted = tidy(answer), tidy(item.reference)
        if _label(given) == _label(wanted):
            return Verdict(1.0, "equal")
        for rule in (_years, _truths, self._amounts, self._option_letters, self._lists):
            if (outcome := rule(given, wanted, item)) is not None:
                return outcome
        if amount(wanted) is None:
            return compare(given, wanted, tolerance=self.rules(item).tolerance)
        return super().score(answer, item)  # a fraction, a root, a number in words

    def _amounts(self, given: str, wanted: str, item: Item) -> Outcome | None:
        one, other = amount(given), amount(wanted)
        if one is None or other is None:
            return None
        if (currency := _currency(given)) and (right := _currency(wanted)) and currency != right:
            return Verdict(0.0, "different")
        same = _same_amount(one, other, item.question, self.rules(item))
        return Verdict(1.0, "number") if same else Verdict(0.0, "different")

    def _option_letters(self, given: str, wanted: str, item: Item) -> Outcome | None:
        """Decide one letter. Several, and labels that begin like an option, are left to the rule of lists."""
        if len(choices.of_reference(wanted)) != 1 or not (choices.letters(given) or choices.alternatives(given)):
            return None
        return self._option(given, wanted, item)

    def _lists(self, given: str, wanted: str, item: Item) -> Outcome | None:
        """Decide lists of labels and numbers; a judge is asked where labels differ that may be spelled otherwise."""
        ones, others = _labels(given), _labels(wanted)
        if len(others) < 2:
            return None
        if len(ones) < len(others) and set(map(_label, ones)) <= set(map(_label, others)):
            return Verdict(0.0, "incomplete")
        if len(ones) > len(others) and set(map(_label, others)) <= set(map(_label, ones)):
            return Verdict(0.0, "different")
        rules = self.rules(item)
        matches = [[_same_label(one, other, item.question, rules) for other in others] for one in ones]
        if len(ones) == len(others):
            if rules.ordered and all(row[number] for number, row in enumerate(matches)):
                return Verdict(1.0, "list")
            if not rules.ordered and _one_to_one(matches):
                return Verdict(1.0, "list")
        numbers = all(amount(part) or len(part) == 1 for part in (*ones, *others))
        return Verdict(0.0, "different") if numbers or all(map(any, matches)) else Ask("list")


@lru_cache(maxsize=4096)
def amount(text: str) -> Amount | None:
    """Return the number that a text in the notation of `rewards.notation` is, with its scale and sign of per cent."""
    match = _AMOUNT.fullmatch(text) if len(text) < 100 else None
    if match is None or (number := real(match["number"].strip())) is None:
        if (said := word_number(text)) is not None:
            return Amount(float(said))
        begins = text[:1] in "+-.0123456789" and not _RANGE.match(text)
        measured = read_quantity(text) if match is None and begins else None
        return Amount(measured.number) if measured else None
    word = match["scale"] or ""
    sign = -1 if match["sign"] == "-" else 1
    return Amount(sign * number, _SCALES.get(word, 1.0), word, bool(match["percent"]))


def _currency(text: str) -> str:
    """Return the name of the currency that an amount has, or nothing."""
    found = _CURRENCY.search(text)
    return _CURRENCIES.get(found[0], found[0]) if found else ""


def _same_amount(one: Amount, other: Amount, question: str, rules: Rules) -> bool:
    if close(one.value, other.value, rules.tolerance):
        return True
    if (asked := _SCALE_ASKED.search(question)) and not (one.scale_word or other.scale_word):
        scale = _SCALES[asked[1].casefold()]
        return any(close(one.number * factor, other.number, rules.tolerance) for factor in (scale, 1 / scale))
    if one.percent != other.percent and rules.percent and one.scale == other.scale:
        return close(one.number, other.number, rules.tolerance)
    word = one.scale_word or other.scale_word
    named = word == "m" or (len(word) > 1 and word.rstrip("s") in question.casefold())  # m: million, or metres
    return named and not (one.scale_word and other.scale_word) and close(one.number, other.number, rules.tolerance)


def _years(given: str, wanted: str, item: Item) -> Outcome | None:
    """Decide years, which are exact, where the question asks for one."""
    right, said = _YEAR.fullmatch(wanted), _YEAR.fullmatch(given)
    if right is None or not _asks_for_year(item.question):
        return None
    if said is None:
        number = amount(given)
        same = number is not None and number.value == float(right[1])
        return Verdict(float(same), "year") if number or HEDGE.search(given) else None
    return Verdict(float(said[1] == right[1]), "year")


def _asks_for_year(question: str) -> bool:
    """Return whether a number from 1000 to 2999 is a year: unless an amount is asked for, which may be near."""
    if _AMOUNT_ASKED.search(question):
        return False
    if _YEAR_ASKED.search(question) or not question.strip():
        return True
    return _LABEL_ASKED.search(question) is not None and not _VALUE_ASKED.search(question)


def _truths(given: str, wanted: str, item: Item) -> Outcome | None:
    """Decide yes and no; 1 and 0 are words for them where the other side is one."""
    right, said = truth(wanted), truth(given)
    digits = {"1": True, "1.0": True, "0": False, "0.0": False}
    if right is None and said is not None:
        right = digits.get(wanted)
    elif said is None and right is not None:
        said = digits.get(given)
    return None if right is None or said is None else Verdict(float(right == said), "truth")


def _label(text: str) -> str:
    return plain(text).strip(" .,;'\"")


def _labels(text: str) -> list[str]:
    """Return the parts of "A, B and C" or "[A, B]"."""
    inner = text.strip()
    if inner[:1] in ("[", "(", "{", "⦃") and inner[-1:] in ("]", ")", "}", "⦄"):
        inner = inner[1:-1]
    if amount(inner) is not None:
        return [inner]
    parts = (
        re.split(r"\s*;\s*|\n+", inner)
        if ";" in inner or "\n" in inner
        else re.split(r"\s*,\s*(?:and\s+)?|\s+and\s+|\s+&\s+|和|、", inner)
    )
    return [part.strip() for part in parts if part.strip()][: _MAX_LABELS + 1]


def _same_label(one: str, other: str, question: str, rules: Rules) -> bool:
    if _label(one) == _label(other):
        return True
    if _asks_for_year(question) and (right := _YEAR.fullmatch(other)) and (said := _YEAR.fullmatch(one)):
        return said[1] == right[1]
    first, second = amount(one), amount(other)
    return first is not None and second is not None and _same_amount(first, second, question, rules)


def _one_to_one(matches: list[list[bool]]) -> bool:
    """Return whether every row has a column of its own; greedy, the most particular rows first."""
    free = set(range(len(matches)))
    for row in sorted(matches, key=sum):
        column = next((number for number in sorted(free) if row[number]), None)
        if column is None:
            return False
        free.discard(column)
    return True
