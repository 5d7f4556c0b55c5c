"""Units of measurement: names are looked up in pint's registry, how they are combined is read by a grammar of ours.

    unit("km/h")      Unit(0.2777..., {"[length]": 1, "[time]": -1})         factor to the base units of the SI
    unit("N·m") and unit("J")                                                the same
    unit("apples")    None

pint is never given an expression: its parser evaluates powers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

_MAX_CHARACTERS = 60
_MAX_POWER = 12

_NAMES = {  # where pint has another name, or another unit of this name
    "Nm": "newton*meter",
    "Kg": "kilogram",
    "KG": "kilogram",
    "KM": "kilometer",
    "nt": "newton",
    "sec": "second",
    "secs": "second",
    "mins": "minute",
    "hrs": "hour",
    "kmph": "kilometer/hour",
    "kph": "kilometer/hour",
    "mph": "mile/hour",
    "cc": "centimeter^3",
    "C": "coulomb",
    "F": "farad",
    "H": "henry",
    "h": "hour",
    "g": "gram",
    "u": "unified_atomic_mass_unit",
    "amp": "ampere",
    "amps": "ampere",
    "Ohm": "ohm",
    "ohms": "ohm",
    "Ω": "ohm",
    "Å": "angstrom",
    "Wh": "watt*hour",
    "kWh": "kilowatt*hour",
    "Ah": "ampere*hour",
    "mAh": "milliampere*hour",
    "rpm": "revolution/minute",
    "M": "mole/liter",
    "mM": "millimole/liter",
    "米": "meter",
    "千米": "kilometer",
    "公里": "kilometer",
    "厘米": "centimeter",
    "毫米": "millimeter",
    "千克": "kilogram",
    "公斤": "kilogram",
    "克": "gram",
    "吨": "tonne",
    "秒": "second",
    "分": "minute",
    "分钟": "minute",
    "小时": "hour",
    "天": "day",
    "牛": "newton",
    "牛顿": "newton",
    "焦": "joule",
    "焦耳": "joule",
    "瓦": "watt",
    "瓦特": "watt",
    "伏": "volt",
    "伏特": "volt",
    "安": "ampere",
    "安培": "ampere",
    "欧": "ohm",
    "欧姆": "ohm",
    "赫兹": "hertz",
    "帕": "pascal",
    "帕斯卡": "pascal",
    "升": "liter",
    "毫升": "milliliter",
    "摩尔": "mole",
}
_DEGREES = frozenset(("°", "degree", "degrees", "deg", "度"))
_FOREIGN = frozenset(  # words and signs that pint has units for: "mass" is several milliarcseconds
    ("a", "c", "e", "k", "R", "at", "are", "as", "ares", "count", "counts", "mass", "point", "points", "x")
)
_TEMPERATURES = {"celsius": (1.0, 273.15), "fahrenheit": (5 / 9, 459.67 * 5 / 9)}
_CELSIUS = re.compile(r"(?:°|degrees?|deg)?\s*(?:celsius|centigrade|C)|摄氏度")
_FAHRENHEIT = re.compile(r"(?:°|degrees?|deg)\s*(?:fahrenheit|F)|fahrenheit|华氏度")
_TOKEN = re.compile(
    r"(?P<name>[A-Za-zμΩÅ°_]+|[\u4e00-\u9fff]+)(?:\s*(?:\^|\*\*)\s*\{?\s*(?P<power>[-+]?\d{1,2})\s*\}?|(?P<attached>-?\d(?![\d.])))?"
    r"|(?P<one>1(?=\s*/))|(?P<sign>[*/()])|(?P<space>\s+)"
)
_PART = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([A-Za-zμ°\u4e00-\u9fff]{1,12})")
_COMPOUND = re.compile(rf"{_PART.pattern}(?:\s*(?:,|and\b|又)?\s*{_PART.pattern}){{1,3}}")
_GROUP = r"\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"
_WORDS = (
    (re.compile(rf"\\frac\s*{_GROUP}\s*{_GROUP}"), r"(\1)/(\2)"),
    (re.compile(r"\bper\b|每"), "/"),
    (re.compile(r"°\s*C\b"), "K"),  # in a product, as J/(kg*°C): a difference of temperatures
    (re.compile(r"\b(?:square|sq\.?)\s+([A-Za-z]+)"), r"\1^2"),
    (re.compile(r"\b(?:cubic|cu\.?)\s+([A-Za-z]+)"), r"\1^3"),
    (re.compile(r"\b([A-Za-z]+)\s+squared\b"), r"\1^2"),
    (re.compile(r"\b([A-Za-z]+)\s+cubed\b"), r"\1^3"),
    (re.compile(r"平方([\u4e00-\u9fff]+)"), r"\1^2"),
    (re.compile(r"立方([\u4e00-\u9fff]+)"), r"\1^3"),
)


@dataclass(frozen=True)
class Unit:
    """A unit by its size.

    Attributes:
        factor: How many base units one of it is.
        dimension: Powers of the base dimensions, those that are 0 absent.
        offset: What is added after the multiplication: degrees Celsius and Fahrenheit.
    """

    factor: float
    dimension: frozenset[tuple[str, float]]
    offset: float = 0.0


@lru_cache(maxsize=4096)
def unit(text: str) -> Unit | None:
    """Return the unit that a text in the notation of `rewards.notation` names, or None."""
    text = text.strip()
    if not text or len(text) > _MAX_CHARACTERS:
        return None
    for pattern, name in ((_CELSIUS, "celsius"), (_FAHRENHEIT, "fahrenheit")):
        if pattern.fullmatch(text) or (len(text) > 3 and pattern.fullmatch(text.casefold())):
            if text == "C":
                break  # coulomb
            factor, offset = _TEMPERATURES[name]
            return Unit(factor, frozenset((("[temperature]", 1.0),)), offset)
    for pattern, replacement in _WORDS:
        text = pattern.sub(replacement, text)
    return _product(text)


def _product(text: str) -> Unit | None:
    factor, powers, position = 1.0, dict[str, float](), 0
    sign, outer = 1, list[int]()  # of the next names; of the groups that are open
    seen = due = False  # whether a name was read; whether one must follow
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        position = match.end()
        if match["name"]:
            named = _named(match["name"])
            if named is None or (not seen and (match["attached"] or "").startswith("-")):
                return None  # "m s-1" is a unit, "5m-3" is a difference
            power = int(match["power"] or match["attached"] or 1)
            if power > 0:  # "J/mol K" is "J/(mol K)", as physicists write it; "J/mol K^-1" says it of each
                power *= sign
            power *= outer[-1] if outer else 1
            if abs(power) > _MAX_POWER:
                return None
            factor *= named[0] ** power
            for dimension, exponent in named[1].items():
                powers[dimension] = powers.get(dimension, 0) + power * exponent
            seen, due = True, False
        elif match["one"]:
            due = False
        elif match["sign"]:
            if match["sign"] == "(":
                outer.append((outer[-1] if outer else 1) * sign)
                sign = 1
            elif match["sign"] == ")":
                if not outer:
                    return None
                outer.pop()
                sign = 1
            elif due:
                return None
            else:
                sign, due = -1 if match["sign"] == "/" else sign, True
    if outer or due or not seen:
        return None
    return Unit(factor, frozenset((name, float(power)) for name, power in powers.items() if power))


@cache
def _registry() -> Any:
    import pint  # takes a second: only where an answer has a unit

    return pint.UnitRegistry(autoconvert_offset_to_baseunit=True)


def compound(text: str) -> tuple[Fraction, Unit] | None:
    """Return the sum of "1 h 30 min" or "5 ft 3 in" in its first unit; None for anything else.

    Units of one dimension must follow each other, the larger first.
    """
    if len(text) > _MAX_CHARACTERS or not _COMPOUND.fullmatch(text):
        return None
    parts = [(Fraction(number), unit(name)) for number, name in _PART.findall(text)]
    first, last = parts[0][1], math.inf
    total = Fraction(0)
    for number, named in parts:
        if first is None or named is None or named.offset or named.dimension != first.dimension or named.factor >= last:
            return None
        total, last = total + number * Fraction(named.factor) / Fraction(first.factor), named.factor
    return (total, first) if first else None


@lru_cache(maxsize=2048)
def _named(name: str) -> tuple[float, Mapping[str, float]] | None:
    """Return (factor, powers of the dimensions) of one name."""
    if name in _FOREIGN:
        return None
    if name in _DEGREES:  # the most common unit of all, without the second that pint takes
        return math.pi / 180, {}
    if name in _NAMES:
        name = _NAMES[name]
    elif not name.isascii() and not set(name) <= set("μΩÅ") | set(map(chr, range(128))):
        return None
    factor, powers = 1.0, dict[str, float]()
    for operator, part in re.findall(r"([*/]?)([^*/]+)", name):
        base, _, power = part.partition("^")
        sign = -1 if operator == "/" else 1
        found = _of_pint(base)
        if found is None:
            return None
        exponent = sign * int(power or 1)
        factor *= found[0] ** exponent
        for dimension, size in found[1].items():
            powers[dimension] = powers.get(dimension, 0) + exponent * size
    return factor, powers


def _of_pint(name: str) -> tuple[float, Mapping[str, float]] | None:
    registry = _registry()
    for spelling in (name.replace("Ω", "ohm"), name.casefold() if len(name) > 3 else name):
        if spelling.startswith("_") or not registry.parse_unit_name(spelling):
            continue
        quantity = registry.Quantity(1.0, registry.Unit(spelling)).to_base_units()
        # base units of pint are the SI's: kilogram, metre, second, ampere, kelvin, mole, candela, radian
        return float(quantity.magnitude), {str(key): float(size) for key, size in quantity.dimensionality.items()}
    return None
