"""Short answers that are a number, perhaps with a unit or the thing counted.

    "1,200", "3/4", "twelve", "第二"  ->   1200, 3/4, 12, 2
    "1.98 m", "50%", "3 dogs"         ->   with a unit that is known, or a noun

Two quantities of one kind are decided by rule, both ways: 200 cm is 2 m, 1.98 m is not. A tolerance is relative.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from rewards.plain_text import plain

MAX_LETTERS = 60
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_ORDINALS = "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
_CHINESE = "零一二三四五六七八九十"
WORDS: Mapping[str, int] = {
    **{word: i for i, word in enumerate(_ONES.split())},
    **{word: 10 * i for i, word in enumerate(_TENS.split(), 2)},
    **{
        f"{ten}-{one}": 10 * i + j
        for i, ten in enumerate(_TENS.split(), 2)
        for j, one in enumerate(_ONES.split()[1:10], 1)
    },
    **{character: i for i, character in enumerate(_CHINESE)},
    "两": 2,
}
ORDINALS: Mapping[str, int] = {word: i for i, word in enumerate(_ORDINALS.split())}

# kind, its base units in one unit, and the unit's names
_UNITS = (
    ("length", "1/1000", "mm millimeter millimeters millimetre millimetres 毫米"),
    ("length", "1/100", "cm centimeter centimeters centimetre centimetres 厘米"),
    ("length", "1", "m meter meters metre metres 米"),
    ("length", "1000", "km kilometer kilometers kilometre kilometres 千米 公里"),
    ("length", "0.0254", "inch inches"),
    ("length", "0.3048", "ft foot feet"),
    ("length", "0.9144", "yd yard yards"),
    ("length", "1609.344", "mile miles"),
    ("angle", "1", "° degree degrees deg 度"),
    ("time", "1/1000", "ms millisecond milliseconds"),
    ("time", "1", "s sec secs second seconds 秒"),
    ("time", "60", "min mins minute minutes 分钟"),
    ("time", "3600", "h hr hrs hour hours 小时"),
    ("mass", "1", "g gram grams 克"),
    ("mass", "1000", "kg kilogram kilograms 千克 公斤"),
    ("share", "1", "% percent"),
)
_KINDS = {unit: (kind, Fraction(factor)) for kind, factor, names in _UNITS for unit in names.split()}
_NUMBER = r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d{1,30})(?:\.\d{0,30})?|[-+−]?\.\d{1,30}"
_QUANTITY = re.compile(
    rf"(?P<above>{_NUMBER})(?:/(?P<below>\d{{1,9}}))?(?:\s*(?P<unit>°|%|[^\W\d_]+(?: [^\W\d_]+){{0,2}}))?"
)
_WORDED = re.compile(
    rf"(?P<word>{'|'.join(sorted(WORDS, key=len, reverse=True))})(?:\s+(?P<unit>[^\W\d_]+(?: [^\W\d_]+){{0,2}}))?"
)
_NOT_NOUNS = re.compile(
    r"\b(?:or|and|to|of|out|than|but|about|times|hundred|thousand|million|billion|trillion|minus|plus)\b"
)


@dataclass(frozen=True)
class Quantity:
    """A number with its unit: a kind and a factor to the kind's base, a noun, or neither."""

    number: Fraction
    kind: str = ""
    factor: Fraction = Fraction(1)
    noun: str = ""


def quantity_in(text: str) -> Quantity | None:
    """Return the quantity that a short text is; None if it is anything else."""
    if len(text) > MAX_LETTERS:
        return None
    bare = plain(text)
    found = _QUANTITY.fullmatch(bare)
    if found:
        below = Fraction(found["below"] or 1)
        if not below:
            return None
        number = Fraction(found["above"].replace(",", "").replace("−", "-")) / below
    else:
        found = _WORDED.fullmatch(bare)
        if found is None:
            return None
        number = Fraction(WORDS[found["word"]])
    unit = found["unit"] or ""
    if unit in _KINDS:
        return Quantity(number, *_KINDS[unit])
    return None if _NOT_NOUNS.search(unit) else Quantity(number, noun=unit.removesuffix("s"))


def decide(given: Quantity, wanted: Quantity, tolerance: float = 0.0) -> bool | None:
    """Return whether two quantities agree; None where that depends on units or nouns.

    Args:
        given: The answer.
        wanted: The reference. An answer without unit takes the reference's.
        tolerance: The greatest difference, as a share of the reference.
    """
    if given.kind and wanted.kind:
        if given.kind != wanted.kind:
            return False
        return _near(given.number * given.factor, wanted.number * wanted.factor, tolerance)
    same = _near(given.number, wanted.number, tolerance)
    if "share" in (given.kind, wanted.kind) and not (given.noun or wanted.noun):  # 50% is 50, and 0.5
        factor = Fraction(1, 100) if given.kind else Fraction(100)
        return same or _near(given.number * factor, wanted.number, tolerance)
    if not given.kind and not wanted.kind:
        return same if given.noun == wanted.noun or not (given.noun and wanted.noun) or not same else None
    if not given.kind and not given.noun:  # "2" for "2 m"
        return same
    if not wanted.kind and not wanted.noun:  # "2 m" for "2"; "200 cm" may be right too
        return True if same else None
    return None


def _near(given: Fraction, wanted: Fraction, tolerance: float) -> bool:
    return abs(given - wanted) <= abs(wanted) * Fraction(str(tolerance))
