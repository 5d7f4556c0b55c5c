"""Equations as laws: two equations are the same if every point that satisfies one satisfies the other.

"F = m*a" and "a = F/m" are the same, "F = m*g" is another. Points are found by numbers: all variables but one get fixed
values, and the last one is solved for by bisection where the two sides change their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

from rewards.evaluate import NoValue, Number, value
from rewards.expression import Node, variables

_VALUES = (0.61, 1.37, 2.23, 0.83, 1.79, 2.91, 1.13, 0.47)
_TRIALS = 4
_GRID = tuple(sign * 10 ** (step / 12) for sign in (1, -1) for step in range(-36, 37))
_RESIDUAL = 1e-7
_MAX_VARIABLES = 8
_MAX_ROOTS = 3  # per trial

Sides = tuple[Node, Node]


def same_law(first: Sides, second: Sides) -> Literal["same", "different", "unknown"]:
    """Compare two equations, each given by its two sides."""
    names = [variables(sides[0]) | variables(sides[1]) for sides in (first, second)]
    if names[0] != names[1] or not names[0]:
        return "different"
    if len(names[0]) > _MAX_VARIABLES:
        return "unknown"
    tried = 0
    for one, other in ((first, second), (second, first)):
        found = 0
        for point in _points(one, sorted(names[0])):
            residual = _residual(other, point)
            if residual is None:
                continue
            if residual > _RESIDUAL:
                return "different"
            found += 1
        tried += found > 0
    return "same" if tried == 2 else "unknown"


def _points(sides: Sides, names: list[str]) -> Iterator[Mapping[str, Number]]:
    """Yield points that satisfy an equation: positive ones, as physics means them, where there are any."""
    for trial in range(_TRIALS):
        free = names[trial % len(names)]
        values: dict[str, Number] = {
            name: _VALUES[(trial * 3 + index) % len(_VALUES)] for index, name in enumerate(names) if name != free
        }
        for root in _roots(sides, values, free):
            yield {**values, free: root}


def _roots(sides: Sides, values: dict[str, Number], free: str) -> Iterator[float]:
    """Yield roots of left - right in one variable: positive ones that the grid separates, else negative ones."""
    found = 0
    last: tuple[float, float] | None = None
    for x in _GRID:
        if found >= _MAX_ROOTS or (x < 0 and found):
            return
        y = _difference(sides, values, free, x)
        if y is None:
            last = None
            continue
        if y == 0:
            found += 1
            yield x
        elif last is not None and last[0] * x > 0 and (last[1] < 0) != (y < 0) and last[1] != 0:
            root = _bisect(sides, values, free, last[0], x)
            if root is not None:
                found += 1
                yield root
        last = (x, y)


def _bisect(sides: Sides, values: dict[str, Number], free: str, low: float, high: float) -> float | None:
    below = _difference(sides, values, free, low)
    for _ in range(200):
        middle = (low + high) / 2
        y = _difference(sides, values, free, middle)
        if y is None or below is None:
            return None
        if y == 0 or middle in (low, high):
            break
        if (y < 0) == (below < 0):
            low = middle
        else:
            high = middle
    residual = _residual(sides, {**values, free: middle})
    return middle if residual is not None and residual <= _RESIDUAL else None  # else a pole


def _difference(sides: Sides, values: dict[str, Number], free: str, x: float) -> float | None:
    values[free] = x
    try:
        difference = value(sides[0], values) - value(sides[1], values)
    except NoValue:
        return None
    finally:
        del values[free]
    return difference if isinstance(difference, float) and math.isfinite(difference) else None


def _residual(sides: Sides, point: Mapping[str, Number]) -> float | None:
    """Return |left - right| relative to the larger of both; None where a side has no value."""
    try:
        left, right = value(sides[0], point), value(sides[1], point)
    except NoValue:
        return None
    size = max(abs(left), abs(right), 1e-3)
    return abs(left - right) / size if math.isfinite(size) else None
