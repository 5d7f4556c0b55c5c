"""The shape of an answer in mathematics: one expression, several, a tuple, an interval, an equation.

    read("{1, 2}")             Shape("set", (one 1, one 2))
    read("1, 2") "1 or 2"      Shape("list", ...)      several answers, whose order counts only where it is asked for
    read("(1, 2)")             Shape("tuple", ...)     and Spans((1, 2, open, open)) for one who looks for an interval
    read("x > 5")              Shape("spans", ...)     the same as (5, ∞) and {x | x > 5}
    read("±2")                 Shape("list", (one 2, one -2))
    read("y = 2x")             Shape("equation", (one y, one 2x))

Texts are in the notation of `rewards.notation`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from rewards.quantity import real

MAX_PARTS = 60  # of a list
_MAX_DEPTH = 4

_OPEN, _CLOSE = "([{⦃", ")]}⦄"
_PAIRS = dict(zip(_OPEN, _CLOSE, strict=True))
_OR = re.compile(r"\s+(?:or|and)\s+|或|和", re.IGNORECASE)
_AND = re.compile(r"\band\b", re.IGNORECASE)
_RELATION = re.compile(r"<=|>=|!=|[<>≤≥≠]")
_COMMA_IN_NUMBER = re.compile(r"\d,\d{3}(?!\d)|\.\d{3},\d")
_MEMBER = re.compile(r"^\s*([A-Za-zα-ω])\s*∈\s*")
_BUILDER = re.compile(r"[⦃{]\s*[A-Za-z]\s*(?:∈\s*ℝ\s*)?[|:]\s*([^⦃⦄{}]*)[⦄}]")
_REALS = re.compile(r"ℝ|all real numbers|all reals|the real numbers|(?:x is )?any real number", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-zα-ω](?:_\{?\w+\}?)?|\\[a-z]+")
_SPELLED = {"<=": "≤", ">=": "≥", "!=": "≠"}
_TURNED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "≠": "≠"}

Kind = Literal["one", "set", "list", "tuple", "spans", "equation", "empty"]


@dataclass(frozen=True)
class Span:
    """An interval of real numbers."""

    low: float
    high: float
    low_closed: bool
    high_closed: bool


@dataclass(frozen=True)
class Shape:
    """What a text is.

    Attributes:
        kind: `one` is anything without a shape of its own.
        text: The text it was read from.
        parts: What it consists of: of a set, list or tuple, or the two sides of an equation.
        spans: The union of intervals that it is, or that it could be: a tuple "(1, 2)" is one too.
        variable: Of an inequality: what it is about; empty for an interval.
    """

    kind: Kind
    text: str
    parts: tuple[Shape, ...] = ()
    spans: tuple[Span, ...] | None = None
    variable: str = ""


@lru_cache(maxsize=8192)
def read(text: str, depth: int = 0) -> Shape:
    """Return the shape of a text."""
    text = text.strip().removeprefix("≈").strip()
    if len(text) > 1000 or depth > _MAX_DEPTH:
        return Shape("one", text)
    if text in ("∅", "⦃⦄", "{}", "no solution", "no solutions", "empty set", "无解", "空集"):
        return Shape("empty", text, (), ())
    if builder := _BUILDER.fullmatch(text):
        return read(builder[1], depth + 1)
    if member := _MEMBER.match(text):
        inner = read(text[member.end() :], depth + 1)
        return Shape(inner.kind, inner.text, inner.parts, inner.spans, member[1])
    for reading in (_plus_minus, _spans_of_union, _several, _bracketed, _inequality, _equation):
        if (shape := reading(text, depth)) is not None:
            return shape
    return Shape("one", text)


def split(text: str, marks: str) -> list[str] | None:
    """Split a text at marks outside all brackets; None if brackets do not match. Half-open intervals match."""
    parts, start, depth = [], 0, 0
    for position, character in enumerate(text):
        if character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth -= 1
            if depth < 0:
                return None
        elif character in marks and not depth:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]] if not depth else None


def _plus_minus(text: str, depth: int) -> Shape | None:
    if "±" not in text and "∓" not in text:
        return None
    upper = text.replace("±", "+").replace("∓", "-")
    lower = text.replace("±", "-").replace("∓", "+")
    parts: list[Shape] = []
    for branch in (upper, lower):
        shape = read(branch, depth + 1)
        parts += shape.parts if shape.kind in ("set", "list") else (shape,)
    return Shape("list", text, tuple(parts))


def _spans_of_union(text: str, depth: int) -> Shape | None:
    if _REALS.fullmatch(text):
        return Shape("spans", text, (), (Span(-math.inf, math.inf, False, False),))
    parts = split(text.replace(" U ", "∪"), "∪") or []
    if len(parts) < 2:
        return None
    shapes = [read(part, depth + 1) for part in parts]
    if any(shape.spans is None for shape in shapes):
        return None
    return Shape("spans", text, (), _union([span for shape in shapes for span in shape.spans or ()]))


def _several(text: str, depth: int) -> Shape | None:
    """Read several answers: "1, 2", "1; 2", "x = 1 or x = 2"."""
    if _number_with_commas(text):
        return None
    parts = [part for clause in _OR.split(text) for part in _parts(clause)]
    parts = [part for part in map(str.strip, parts) if part]
    if not 1 < len(parts) <= MAX_PARTS:
        return None
    shapes = _with_name(tuple(read(part, depth + 1) for part in parts))
    named = {shape.variable for shape in shapes if shape.kind == "spans"}
    if len(named) == 1 and all(shape.kind == "spans" and shape.variable for shape in shapes):
        spans = [span for shape in shapes for span in shape.spans or ()]
        both = _AND.search(text) is not None
        found = _intersection(spans) if both and len(spans) == len(shapes) else () if both else _union(spans)
        if found:
            return Shape("spans", text, (), found, shapes[0].variable)
    return Shape("list", text, shapes)


def _with_name(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Return "x = 1, 2" as if it were "x = 1, x = 2"."""
    first = shapes[0]
    if (
        first.kind == "equation"
        and all(shape.kind == "one" for shape in shapes[1:])
        and real(first.parts[0].text) is None
    ):
        left = first.parts[0]
        return (first, *(Shape("equation", f"{left.text}={shape.text}", (left, shape)) for shape in shapes[1:]))
    return shapes


def _parts(text: str) -> list[str]:
    """Split at semicolons outside brackets, or at commas if there are none."""
    for mark in ";,\n":
        parts = split(text, mark)
        if parts is not None and len(parts) > 1:
            return [part for half in parts for part in (_parts(half) if mark == ";" and "," in half else [half])]
    return [text]


def _number_with_commas(text: str) -> bool:
    return _COMMA_IN_NUMBER.search(text) is not None and ", " not in text and real(text) is not None


def _bracketed(text: str, depth: int) -> Shape | None:
    """Read a set, a tuple or an interval: one pair of brackets around all."""
    if len(text) < 2 or text[0] not in _OPEN or text[-1] not in _CLOSE or _closing(text) != len(text) - 1:
        return None
    inner, matched = text[1:-1], _PAIRS[text[0]] == text[-1]
    parts = [part.strip() for part in _parts(inner)]
    if len(parts) > MAX_PARTS:
        return None
    if text[0] in "{⦃":
        return Shape("set", text, tuple(read(part, depth + 1) for part in parts)) if matched else None
    if len(parts) == 1:
        return read(inner, depth + 1) if matched and text[0] == "(" else None
    shapes = tuple(read(part, depth + 1) for part in parts)
    span = _span(parts, text[0] == "[", text[-1] == "]")
    if not matched or (text[0] == "[" and span is not None):
        return None if span is None else Shape("spans", text, shapes, (span,))
    return Shape("tuple", text, shapes, None if span is None else (span,))


def _closing(text: str) -> int:
    """Return where the first bracket closes, or -1. An interval's brackets may differ."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if not depth:
            return position
    return -1


def _span(ends: list[str], low_closed: bool, high_closed: bool) -> Span | None:
    if len(ends) != 2:
        return None
    low, high = (_end(end) for end in ends)
    if low is None or high is None or low > high:
        return None
    return Span(low, high, low_closed and low > -math.inf, high_closed and high < math.inf)


def _end(text: str) -> float | None:
    text = text.strip().replace("infinity", "∞").replace("inf", "∞").replace(" ", "")
    infinite = {"∞": math.inf, "+∞": math.inf, "-∞": -math.inf}
    return infinite[text] if text in infinite else real(text)


def _inequality(text: str, depth: int) -> Shape | None:
    """Read "x > 5", "0 < x ≤ 1" and "x ≠ 0" as intervals."""
    signs = [_SPELLED.get(sign, sign) for sign in _RELATION.findall(text)]
    sides = [side.strip() for side in _RELATION.split(text)]
    if not 1 <= len(signs) <= 2:
        return None
    ends = [_end(side) for side in sides]
    if len(signs) == 1 and ends[0] is not None and ends[1] is None:
        signs, sides, ends = [_TURNED[signs[0]]], sides[::-1], ends[::-1]
    if len(signs) == 1 and ends[0] is None and ends[1] is not None and _VARIABLE.fullmatch(sides[0]):
        return Shape("spans", text, (), _ray(signs[0], ends[1]), sides[0])
    if len(signs) == 2 and ends[0] is not None and ends[2] is not None and _VARIABLE.fullmatch(sides[1]):
        if {*signs} <= {">", "≥"}:
            signs, ends = [_TURNED[sign] for sign in reversed(signs)], ends[::-1]
        low, high = ends[0], ends[2]
        if {*signs} <= {"<", "≤"} and low is not None and high is not None and low <= high:
            span = Span(low, high, signs[0] == "≤" and low > -math.inf, signs[1] == "≤" and high < math.inf)
            return Shape("spans", text, (), (span,), sides[1])
    return None


def _ray(sign: str, end: float) -> tuple[Span, ...]:
    below = Span(-math.inf, end, False, sign == "≤")
    above = Span(end, math.inf, sign == "≥", False)
    return {"<": (below,), "≤": (below,), ">": (above,), "≥": (above,), "≠": (below, above)}[sign]


def _union(spans: list[Span]) -> tuple[Span, ...]:
    """Return intervals in order, those that touch joined."""
    joined: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.low, not span.low_closed)):
        last = joined[-1] if joined else None
        if last and (span.low < last.high or (span.low == last.high and (span.low_closed or last.high_closed))):
            high, closed = max((last.high, last.high_closed), (span.high, span.high_closed))
            joined[-1] = Span(last.low, high, last.low_closed, closed)
        else:
            joined.append(span)
    return tuple(joined)


def _intersection(spans: list[Span]) -> tuple[Span, ...]:
    """Return what is in all intervals; () for nothing or one number."""
    low, low_open = max((span.low, not span.low_closed) for span in spans)
    high, high_closed = min((span.high, span.high_closed) for span in spans)
    return (Span(low, high, not low_open, high_closed),) if low < high else ()


def _equation(text: str, depth: int) -> Shape | None:
    sides = split(text.replace("==", "="), "=")
    if sides is None or len(sides) != 2 or not all(side.strip() for side in sides):
        return None
    return Shape("equation", text, tuple(read(side, depth + 1) for side in sides))
