"""Quantities: a number and its unit.

read("72 km/h")       Quantity(72.0, unit of km/h)
read("3*10^8 m/s")    Quantity(3e8, unit of m/s)
read("two metres")    Quantity(2.0, unit of m)
read("1 h 30 min")    Quantity(1.5, unit of h)
read("12")            Quantity(12.0, None)
read("about 12")      None
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

from rewards.evaluate import NoValue, close, value
from rewards.expression import Unreadable, parse, variables
from rewards.units import Unit, compound, unit
from rewards.words import leading_number

_NUMBER = re.compile(
    r"[-+]?\s*(?:\d[\d,. ]*\d|\d|\.\d+)(?:\s*[*x]\s*10\s*(?:\^|\*\*)\s*\{?\s*[-+]?\d+\s*\}?|[eE][-+]?\d+)?"
)
_NAME = re.compile(r"^\s*(?:[A-Za-zα-ωΑ-Ω]{1,3}(?:_\{?\w{1,8}\}?)?|Δ\s?\w)\s*(?:=|≈)\s*")
_STARTS = re.compile(r"(?<![A-Za-z\\])(?=[A-Za-zμΩÅ°\u4e00-\u9fff])")
_OF_ANGLES = re.compile("sin|cos|tan|cot|sec|csc")  # sin 60° is a number, 60° is a quantity
_SUM = re.compile(r"[\d)}]\s*[-+]\s*[^-+\s]")
_MAX_STARTS = 8

Match: TypeAlias = Literal["same", "number", "unit", "unit_missing", "unit_added"]


@dataclass(frozen=True)
class Quantity:
    """A number, with its unit if it has one."""

    number: float
    unit: Unit | None

    @property
    def base(self) -> float:
        """The number in base units."""
        return self.number if self.unit is None else self.number * self.unit.factor + self.unit.offset


@lru_cache(maxsize=8192)
def read(text: str) -> Quantity | None:
    """Return the quantity that a text in the notation of `rewards.notation` is, or None."""
    text = _NAME.sub("", text, count=1).lstrip("≈~ ").strip()
    if len(text) > 200:
        return None
    if (number := real(text)) is not None and ("°" not in text or _OF_ANGLES.search(text)):
        return Quantity(number, None)
    found = _NUMBER.match(text)
    splits = [found.end()] if found else []
    splits += [match.start() for match in _STARTS.finditer(text, 1)][:_MAX_STARTS]
    for split in splits:
        before = text[:split].rstrip("* ")
        if _SUM.search(before) and before == text[:split] and len(text) == split + 1 and before[-1] != ")":
            continue  # "3+2m" is not 5 m, "2+√3 cm" is a length
        if (number := real(before)) is not None and (measured := unit(text[split:])) is not None:
            return Quantity(number, measured)
    if (summed := compound(text)) is not None:
        return Quantity(float(summed[0]), summed[1])
    said, rest = leading_number(text)
    if not said or (rest and unit(rest) is None):  # "none" alone may say that there is no answer
        return None
    return Quantity(float(said), unit(rest) if rest else None)


@lru_cache(maxsize=8192)
def real(text: str) -> float | None:
    """Return the real number that a text in the notation of `rewards.notation` is, or None."""
    try:
        tree = parse(text)
        if variables(tree):
            return None
        number = value(tree)
    except (Unreadable, NoValue):
        return None
    return number if isinstance(number, float) and math.isfinite(number) else None


def compare(given: Quantity, wanted: Quantity, tolerance: float) -> Match:
    """Compare two quantities.

    Returns:
        `same`; `number` if they differ; `unit` if dimensions differ; `unit_missing` or `unit_added` if only the wanted
        or only the given one has a unit, and the numbers agree.
    """
    if (given.unit is None) != (wanted.unit is None):
        if close(given.number, wanted.number, tolerance):
            return "unit_missing" if given.unit is None else "unit_added"
        measured = given.unit or wanted.unit
        angles = measured is not None and not measured.dimension  # 30° is π/6
        return "same" if angles and close(given.base, wanted.base, tolerance) else "number"
    if given.unit is None or wanted.unit is None:
        return "same" if close(given.number, wanted.number, tolerance) else "number"
    if given.unit.dimension != wanted.unit.dimension:
        return "unit"
    scale = wanted.unit.factor  # 1 nm is not 0 m: the difference is measured in the wanted unit
    same = close((given.base - wanted.unit.offset) / scale, wanted.number, tolerance)
    return "same" if same else "number"
