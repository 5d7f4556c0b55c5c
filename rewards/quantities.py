"""Short answers that are a number, perhaps with a unit or the thing counted.

    "1,200", "3/4", "twelve", "十二"  ->   1200, 3/4, 12, 12
    "1.98 m", "50%", "3 dogs"         ->   with a unit, or a noun

Two quantities of one kind are decided by rule, both ways: 200 cm is 2 m, 1.98 m is not. A tolerance is relative.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.plain_text import trimmed
from rewards.units import Unit, unit
from rewards.words import CHINESE_NUMBER, chinese_number, english_number

MAX_LETTERS = 60
MAX_WORDS = 4  # of a number, as in "one hundred and five"
ROUNDING = Fraction(1, 10**6)  # of decimals and of factors between units; whole numbers are exact
_NUMBER = r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d{1,30})(?:\.\d{0,30})?|[-+−]?\.\d{1,30}"
_DIGITS = re.compile(rf"(?P<above>{_NUMBER})(?:/(?P<below>\d{{1,9}}))?(?P<unit>[^\d.,/:].*)?")
_PERCENT = re.compile(r"%|per ?cent", re.IGNORECASE)
_NOUNS = re.compile(r"[^\W\d_]+(?: [^\W\d_]+){0,2}")
# things that are counted, though there are units of these names: centi-atmospheres, hands of a horse's height ...
_THINGS = re.compile(r"(?:cat|dot|cup|bar|hand|stone|link|chain|rod|barn|pixel)s?", re.IGNORECASE)
_NOT_NOUNS = re.compile(
    r"\b(?:or|and|to|of|out|than|but|about|times|hundred|thousand|million|billion|trillion|minus|plus)\b"
)


@dataclass(frozen=True)
class Quantity:
    """A number with a unit, a noun, a sign of per cent, or nothing."""

    number: Fraction
    unit: Unit | None = None
    noun: str = ""
    percent: bool = False

    @property
    def bare(self) -> bool:
        return self.unit is None and not self.noun


def quantity_in(text: str) -> Quantity | None:
    """Return the quantity that a short text is; None if it is anything else."""
    bare = trimmed(text) if len(text) <= MAX_LETTERS else ""
    found = _DIGITS.fullmatch(bare)
    number, rest = (_fraction(found["above"], found["below"]), found["unit"] or "") if found else _in_words(bare)
    rest = rest.strip()
    if number is None or not rest:
        return None if number is None else Quantity(number)
    if _PERCENT.fullmatch(rest):
        return Quantity(number, percent=True)
    if not _THINGS.fullmatch(rest) and (measured := unit(rest)) is not None:
        return Quantity(number, measured)
    noun = rest.casefold()
    return (
        None if not _NOUNS.fullmatch(noun) or _NOT_NOUNS.search(noun) else Quantity(number, noun=noun.removesuffix("s"))
    )


def decide(given: Quantity, wanted: Quantity, tolerance: float = 0.0) -> bool | None:
    """Return whether two quantities agree; None where that depends on units or nouns.

    Args:
        given: The answer.
        wanted: The reference. An answer without unit takes the reference's.
        tolerance: The greatest difference, as a share of the reference.
    """
    allowed = max(Fraction(str(tolerance)), ROUNDING * (given.number.denominator * wanted.number.denominator > 1))
    if given.unit and wanted.unit and given.unit != wanted.unit:
        return given.unit.dimension == wanted.unit.dimension and _near(_base(given), _base(wanted), allowed + ROUNDING)
    same = _near(given.number, wanted.number, allowed)
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


def _in_words(text: str) -> tuple[Fraction | None, str]:
    """Return the number that a text begins with in words, and the rest."""
    if found := CHINESE_NUMBER.match(text):
        number = chinese_number(found[0])
        return (None if number is None else Fraction(number)), text[found.end() :]
    words = text.split()
    for count in range(min(MAX_WORDS, len(words)), 0, -1):
        if (number := english_number(" ".join(words[:count]))) is not None:
            return Fraction(number), " ".join(words[count:])
    return None, ""


def _base(quantity: Quantity) -> Fraction:
    """Return a quantity in base units."""
    assert quantity.unit is not None
    return quantity.number * Fraction(quantity.unit.factor) + Fraction(quantity.unit.offset)


def _near(given: Fraction, wanted: Fraction, tolerance: Fraction) -> bool:
    return abs(given - wanted) <= abs(wanted) * tolerance
