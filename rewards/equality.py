"""Whether two answers in mathematics are the same, by rules: numbers, expressions, sets, intervals, equations.

Texts are in the notation of `rewards.notation`. The verdict of a comparison is one of

    same          by the rule that `Result.rule` names
    different     both can be read, and differ
    unreadable    one of them is beyond the grammar: symbolic mathematics or a judge may know
    undecided     both can be read, but the rules do not tell
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rewards.evaluate import EXACT, NoValue, close, compare, value
from rewards.expression import CONSTANTS, Node, Unreadable, parse, variables
from rewards.laws import same_law
from rewards.quantity import real
from rewards.shapes import Shape, Span, read

Answer = Literal["same", "different", "unreadable", "undecided"]

_NAME = re.compile(r"[A-Za-zα-ωΑ-Ω](?:_\{?\w+\}?|_?\d)?'?(?:\([A-Za-z]\))?|\\[A-Za-z]+(?:\s*[A-Z]{1,3})?|[A-Z]{2,4}")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # between digits it counts: 2 1/2 is not 21/2
_LETTERS = re.compile(r"[A-Za-z]{2,}")


@dataclass(frozen=True)
class Result:
    """What a comparison says, and by which rule."""

    answer: Answer
    rule: str


@dataclass(frozen=True)
class Rules:
    """How strictly answers are compared.

    Attributes:
        tolerance: Below which |a - b| / (|b| + 1e-6) numbers are equal.
        ordered: Whether the order of "1, 2" counts; that of a tuple always does.
        percent: Whether the question asks for per cent, so that "50" and "50%" are the same.
    """

    tolerance: float = 1e-6
    ordered: bool = False
    percent: bool = False


def compare_answers(given: str, wanted: str, rules: Rules) -> Result:
    """Compare an answer with a reference."""
    return _shapes(read(given), read(wanted), rules)


def is_numeric(text: str) -> bool:
    """Return whether a text is an expression without variables."""
    tree = _tree(text)
    return tree is not None and not variables(tree)


def _shapes(given: Shape, wanted: Shape, rules: Rules) -> Result:
    given, wanted = _without_name(given, wanted), _without_name(wanted, given)
    if wanted.kind == "list" and given.kind == "spans" and given.text[:1] + given.text[-1:] == "[]":
        given = Shape("list", given.text, given.parts)  # "[1, 3]" is a list too
    if given.spans is not None and wanted.spans is not None and "spans" in (given.kind, wanted.kind, "empty"):
        return _spans(given, wanted, rules)
    if "spans" in (given.kind, wanted.kind):
        return Result("different" if _readable(given, wanted) else "unreadable", "interval")
    if given.kind == "equation" and wanted.kind == "equation":
        return _equations(given, wanted, rules)
    if "equation" in (given.kind, wanted.kind):
        return Result("different" if _readable(*_leaves(given), *_leaves(wanted)) else "unreadable", "equation")
    if given.kind == "one" and wanted.kind == "one":
        return _expressions(given.text, wanted.text, rules)
    return _collections(given, wanted, rules)


def _without_name(shape: Shape, other: Shape) -> Shape:
    """Return 5 for "x = 5" and "2 + 3 = 5", where the other is no equation."""
    if shape.kind == "equation" and other.kind not in ("equation", "list", "set"):
        left, right = shape.parts
        if _NAME.fullmatch(left.text.strip()):
            return right
        if _NAME.fullmatch(right.text.strip()) and not _NAME.fullmatch(left.text.strip()):
            return left
        value_left, value_right = real(left.text), real(right.text)
        if value_left is not None and value_right is not None and close(value_left, value_right, EXACT):
            return right
    if shape.kind in ("set", "list") and len(shape.parts) == 1 and other.kind not in ("set", "list"):
        return shape.parts[0]
    return shape


def _leaves(shape: Shape) -> list[Shape]:
    return [leaf for part in shape.parts for leaf in _leaves(part)] if shape.parts else [shape]


def _readable(*shapes: Shape) -> bool:
    return all(shape.kind != "one" or _tree(shape.text) is not None for shape in shapes)


# --- collections ------------------------------------------------------------------------------------------------------


def _collections(given: Shape, wanted: Shape, rules: Rules) -> Result:
    """Compare sets, lists and tuples; a single answer is a list of one."""
    ordered = wanted.kind == "tuple" or (wanted.kind == "list" and rules.ordered)
    if (wanted.kind == "tuple" and given.kind == "set") or (wanted.kind == "set" and given.kind == "tuple"):
        return Result("different", "set")
    ones, others = _members(given), _members(wanted)
    if wanted.kind == "set" or given.kind == "set":
        ones, others = _distinct(ones, rules), _distinct(others, rules)
    rule = "tuple" if ordered else "set"
    if len(ones) != len(others):
        prose = len(others) > 1 and not _readable(*ones)  # "one and its double" may be a list of two
        return Result("different" if _readable(*others) and not prose else "unreadable", rule)
    if ordered:
        return _all([_shapes(one, other, rules) for one, other in zip(ones, others, strict=True)], rule)
    return _matched(ones, others, rules)


def _members(shape: Shape) -> Sequence[Shape]:
    """Return the answers of a collection. Those of "x = 1, x = 3" are 1 and 3 where all are of one name."""
    if shape.kind == "empty":
        return ()
    if shape.kind not in ("set", "list", "tuple"):
        return (_bare(shape),)
    names = {part.parts[0].text if part.kind == "equation" else "" for part in shape.parts}
    return [_bare(part) for part in shape.parts] if len(names) == 1 else shape.parts


def _bare(shape: Shape) -> Shape:
    return shape.parts[1] if shape.kind == "equation" and _NAME.fullmatch(shape.parts[0].text.strip()) else shape


def _distinct(shapes: Sequence[Shape], rules: Rules) -> list[Shape]:
    kept: list[Shape] = []
    for shape in shapes:
        if not any(_shapes(shape, other, rules).answer == "same" for other in kept):
            kept.append(shape)
    return kept


def _matched(ones: Sequence[Shape], others: Sequence[Shape], rules: Rules) -> Result:
    """Match members one to one, in any order."""
    left = list(others)
    unknown = False
    for one in ones:
        results = [_shapes(one, other, rules) for other in left]
        same = next((number for number, result in enumerate(results) if result.answer == "same"), None)
        if same is not None:
            del left[same]
        elif any(result.answer in ("unreadable", "undecided") for result in results):
            unknown = True
        else:
            return Result("different", "set")
    return Result("unreadable" if unknown else "same", "set")


def _all(results: list[Result], rule: str) -> Result:
    answers = {result.answer for result in results}
    for answer in ("different", "unreadable", "undecided"):
        if answer in answers:
            return Result(answer, rule)
    return Result("same", rule)


# --- intervals --------------------------------------------------------------------------------------------------------


def _spans(given: Shape, wanted: Shape, rules: Rules) -> Result:
    if given.variable and wanted.variable and given.variable != wanted.variable:
        return Result("different", "interval")
    ones, others = given.spans or (), wanted.spans or ()
    same = len(ones) == len(others) and all(
        _same_span(one, other, rules) for one, other in zip(ones, others, strict=True)
    )
    return Result("same" if same else "different", "interval")


def _same_span(one: Span, other: Span, rules: Rules) -> bool:
    return (
        (one.low_closed, one.high_closed) == (other.low_closed, other.high_closed)
        and close(one.low, other.low, rules.tolerance)
        and close(one.high, other.high, rules.tolerance)
    )


# --- expressions ------------------------------------------------------------------------------------------------------


def _expressions(given: str, wanted: str, rules: Rules) -> Result:
    if _SPACE.sub("", given) == _SPACE.sub("", wanted):
        return Result("same", "equal")
    one, other = _tree(given), _tree(wanted)
    if one is None and other is not None and variables(other):  # "xy" for "x*y" is a product
        one = _parsed(given)
    elif other is None and one is not None and variables(one):
        other = _parsed(wanted)
    if one is None or other is None:
        return Result("unreadable", "expression")
    if not variables(one) and not variables(other):
        return _numbers(one, other, rules)
    return {
        "same": Result("same", "expression"),
        "different": Result("different", "expression"),
        "same_where_positive": Result("undecided", "domain"),
        "unknown": Result("undecided", "expression"),
    }[compare(one, other)]


def _tree(text: str) -> Node | None:
    if _LETTERS.fullmatch(text) and text not in CONSTANTS:  # a word, not a product of letters
        return None
    return _parsed(text)


def _parsed(text: str) -> Node | None:
    try:
        return parse(text)
    except Unreadable:
        return None


def _numbers(one: Node, other: Node, rules: Rules) -> Result:
    try:
        wanted = value(other)
    except NoValue:
        return Result("undecided", "number")
    try:
        given = value(one)
    except NoValue:
        return Result("different", "number")
    if close(given, wanted, rules.tolerance):
        return Result("same", "number")
    if rules.percent and (one[0] == "%") != (other[0] == "%"):
        given, wanted = (given * 100, wanted) if one[0] == "%" else (given, wanted * 100)
        return Result("same" if close(given, wanted, rules.tolerance) else "different", "number")
    return Result("different", "number")


def _equations(given: Shape, wanted: Shape, rules: Rules) -> Result:
    if (left := given.parts[0].text.strip()) == wanted.parts[0].text.strip() and _NAME.fullmatch(left):
        result = _shapes(given.parts[1], wanted.parts[1], rules)
        if result.answer == "same":
            return Result("same", "equation")
    sides = [[_parsed(part.text) for part in shape.parts] for shape in (given, wanted)]  # "ma" is a product here
    trees = [tree for pair in sides for tree in pair if tree is not None]
    if len(trees) != 4:
        return Result("unreadable", "equation")
    law = same_law((trees[0], trees[1]), (trees[2], trees[3]))
    return Result("undecided" if law == "unknown" else law, "equation")
