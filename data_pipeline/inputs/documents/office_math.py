"""Equations of Office files (OMML) as TeX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lxml import etree

_M = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
_NARY = {"∑": r"\sum", "∏": r"\prod", "∫": r"\int", "∮": r"\oint", "⋃": r"\bigcup", "⋂": r"\bigcap"}
_FUNCTIONS = {"sin", "cos", "tan", "cot", "log", "ln", "exp", "lim", "max", "min", "sup", "inf", "det"}
_ACCENTS = {
    **{"\u0302": r"\hat", "\u0303": r"\tilde", "\u0305": r"\bar", "\u0307": r"\dot", "\u20d7": r"\vec"},
    **{"\u0300": r"\grave", "\u0301": r"\acute", "\u0306": r"\breve", "\u0308": r"\ddot", "\u030c": r"\check"},
}
_BRACES = {"{": r"\{", "}": r"\}"}


def tex_of(element: Any) -> str:
    """Return an equation, or a part of one, as TeX. Structures that are not known are written one after the other."""
    if not isinstance(element.tag, str):
        return ""
    name = etree.QName(element).localname
    if name == "t":
        return element.text or ""
    if name.endswith("Pr"):  # properties
        return ""
    if name in _STRUCTURES and element.tag.startswith(_M):
        return _STRUCTURES[name](element)
    return "".join(tex_of(child) for child in element)


def _part(element: Any, name: str) -> str:
    return "".join(tex_of(part) for part in element.findall(_M + name)).strip()


def _value(element: Any, path: str, default: str) -> str:
    """Return the value of a property."""
    found = element.find("/".join(_M + step for step in path.split("/")))
    return default if found is None else found.get(_M + "val", "")


def _argument(text: str) -> str:
    return text if len(text) == 1 else f"{{{text}}}"


def _marks(element: Any) -> str:
    """Return the subscript and the superscript of a structure."""
    low, high = _part(element, "sub"), _part(element, "sup")
    return (f"_{_argument(low)}" if low else "") + (f"^{_argument(high)}" if high else "")


def _scripts(element: Any) -> str:
    return _part(element, "e") + _marks(element)


def _scripts_before(element: Any) -> str:
    return "{}" + _marks(element) + _part(element, "e")


def _bar(element: Any) -> str:
    line = "overline" if _value(element, "barPr/pos", "bot") == "top" else "underline"
    return f"\\{line}{{{_part(element, 'e')}}}"


def _fraction(element: Any) -> str:
    return f"\\frac{{{_part(element, 'num')}}}{{{_part(element, 'den')}}}"


def _root(element: Any) -> str:
    degree = _part(element, "deg")
    return f"\\sqrt{f'[{degree}]' if degree else ''}{{{_part(element, 'e')}}}"


def _nary(element: Any) -> str:
    sign = _value(element, "naryPr/chr", "∫")
    return f"{_NARY.get(sign, sign)}{_marks(element)} {_part(element, 'e')}"


def _delimiters(element: Any) -> str:
    begin, end = _value(element, "dPr/begChr", "("), _value(element, "dPr/endChr", ")")
    separator = _value(element, "dPr/sepChr", "|")
    inner = separator.join(tex_of(part) for part in element.findall(_M + "e"))
    return _BRACES.get(begin, begin) + inner + _BRACES.get(end, end)


def _function(element: Any) -> str:
    name = _part(element, "fName")
    mark = "\\" if name in _FUNCTIONS else ""
    return f"{mark}{name} {_part(element, 'e')}"


def _accent(element: Any) -> str:
    accent = _value(element, "accPr/chr", "\u0302")
    return f"{_ACCENTS[accent]}{{{_part(element, 'e')}}}" if accent in _ACCENTS else _part(element, "e") + accent


def _limit(mark: str) -> Callable[[Any], str]:
    return lambda element: f"{_part(element, 'e')}{mark}{_argument(_part(element, 'lim'))}"


def _matrix(element: Any) -> str:
    rows = (" & ".join(tex_of(cell) for cell in row.findall(_M + "e")) for row in element.findall(_M + "mr"))
    return r"\begin{matrix}" + r" \\ ".join(rows) + r"\end{matrix}"


def _lines(element: Any) -> str:
    return " \\\\ ".join(tex_of(part) for part in element.findall(_M + "e"))


_STRUCTURES: dict[str, Callable[[Any], str]] = {
    "sSup": _scripts,
    "sSub": _scripts,
    "sSubSup": _scripts,
    "sPre": _scripts_before,
    "bar": _bar,
    "f": _fraction,
    "rad": _root,
    "nary": _nary,
    "d": _delimiters,
    "func": _function,
    "acc": _accent,
    "limLow": _limit("_"),
    "limUpp": _limit("^"),
    "m": _matrix,
    "eqArr": _lines,
}
