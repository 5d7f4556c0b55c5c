"""Short answers that are a number, perhaps with a unit or the thing counted.

    "1,200", "3/4", "twelve", "十二"      ->   1200, 3/4, 12, 12
    "1.2 million", "two thirds", "一半"   ->   1200000, 2/3, 1/2
    "1.98 m", "1 h 30 min", "50%"         ->   with a unit
    "3 dogs", "$5"                        ->   with a noun

Two numbers of one kind are decided by rule, both ways: 200 cm is 2 m, 1.98 m is not. A tolerance is relative.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.plain_text import trimmed
from rewards.units import Unit, compound, unit
from rewards.words import leading_number

MAX_CHARACTERS = 60
ROUNDING = Fraction(1, 10**6)  # of decimals and of factors between units; whole numbers are exact
_NUMBER = r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d{1,30})(?:\.\d{0,30})?|[-+−]?\.\d{1,30}"
_DIGITS = re.compile(rf"(?P<above>{_NUMBER})(?:/(?P<below>\d{{1,9}}))?(?P<unit>[^\d.,/:].*)?")
CURRENCIES = {"$": "dollar", "US$": "dollar", "€": "euro", "£": "pound", "¥": "yuan"}
_PRICE = re.compile(r"(US\$|[$€£¥])\s*(?=[\d.])", re.IGNORECASE)
_SCALES = {
    **{"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12},
    **{"千": 1000, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8},
}
_SCALE = re.compile(rf"(?:{'|'.join(sorted(_SCALES, key=len, reverse=True))})(?:(?<=[a-z])s?\b)?", re.IGNORECASE)
_PERCENT = re.compile(r"%|per ?cent", re.IGNORECASE)
_NOUNS = re.compile(r"[^\W\d_]+(?: [^\W\d_]+){0,2}")
# things that are counted, and parts of a day, though there are units of these names: centi-atmospheres, picometres ...
_THINGS = re.compile(r"(?:cat|dot|cup|bar|hand|stone|link|chain|rod|barn|pixel)s?|am|pm", re.IGNORECASE)
_NOT_NOUNS = re.compile(
    r"\b(?:or|and|to|of|out|than|but|about|times|hundred|thousand|million|billion|trillion|minus|plus)\b"
)


@dataclass(frozen=True)
class ShortNumber:
    """A number with a unit, a noun, a sign of per cent, or nothing."""

    number: Fraction
    unit: Unit | None = None
    noun: str = ""
    percent: bool = False
    scaled: bool = False  # by a word such as million

    @property
    def bare(self) -> bool:
        return self.unit is None and not self.noun


def short_number(text: str) -> ShortNumber | None:
    """Return the number that a short text is; None if it is anything else."""
    bare = trimmed(text) if len(text) <= MAX_CHARACTERS else ""
    currency = ""
    if priced := _PRICE.match(bare):
        currency, bare = CURRENCIES[priced[1].upper()], bare[priced.end() :]
    found = _DIGITS.fullmatch(bare)
    if found:
        number, rest = _fraction(found["above"], found["below"]), (found["unit"] or "").strip()
    else:
        said, rest = leading_number(bare)
        number = None if said is None else Fraction(said)
    if number is None:
        return None
    if scale := _SCALE.match(rest):
        number, rest = number * _SCALES[scale[0].casefold().rstrip("s")], rest[scale.end() :].strip()
    scaled = scale is not None
    if currency or not rest:
        return None if rest else ShortNumber(number, noun=currency, scaled=scaled)
    if _PERCENT.fullmatch(rest):
        return ShortNumber(number, percent=True)
    if not _THINGS.fullmatch(rest) and (measured := unit(rest)) is not None:
        return ShortNumber(number, measured)
    if found and (summed := compound(bare)) is not None:
        return ShortNumber(*summed)
    noun = rest.casefold()
    if not _NOUNS.fullmatch(noun) or _NOT_NOUNS.search(noun):
        return None
    return ShortNumber(number, noun=noun.removesuffix("s"), scaled=scaled)


def decide(given: ShortNumber, wanted: ShortNumber, tolerance: float = 0.0) -> bool | None:
    """Return whether two numbers agree; None where that depends on units or nouns.

    Args:
        given: The answer.
        wanted: The reference. An answer without unit takes the reference's.
        tolerance: The greatest difference, as a share of the reference.
    """
    allowed = max(Fraction(str(tolerance)), ROUNDING * (given.number.denominator * wanted.number.denominator > 1))
    if given.unit and wanted.unit and given.unit != wanted.unit:
        return given.unit.dimension == wanted.unit.dimension and _near(_base(given), _base(wanted), allowed + ROUNDING)
    same = _near(given.number, wanted.number, allowed)
    if given.scaled != wanted.scaled and not same:
        return None  # "2" may be asked for in millions
    if given.percent != wanted.percent and given.bare and wanted.bare:  # 50% is 50, and 0.5
        return same or _near(given.number * (Fraction(1, 100) if given.percent else 100), wanted.number, allowed)
    if given.unit == wanted.unit and (given.noun == wanted.noun or given.bare or wanted.bare):
        return same
    if given.bare:  # "2" for "2 m"
        return same
    return True if same and wanted.bare else None  # "2 m" for "2"; "200 cm" may be right too


def _fraction(above: str, below: str | None) -> Fraction | None:
    divisor = Fraction(below or 1)
    return Fraction(above.replace(",", "").replace("−", "-")) / divisor if divisor else None


def _base(number: ShortNumber) -> Fraction:
    """Return a number in base units."""
    assert number.unit is not None
    return number.number * Fraction(number.unit.factor) + Fraction(number.unit.offset)


def _near(given: Fraction, wanted: Fraction, tolerance: Fraction) -> bool:
    return abs(given - wanted) <= abs(wanted) * tolerance
