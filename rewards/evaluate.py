r"""Values of expressions, in floating point, and equality of expressions by their values.

Two expressions with the same variables are equal if they have the same value at several fixed points, within rounding:
two different analytic expressions agree at such points with probability 0. No value can take long: a power that
overflows is out of range at once, 9^{9^{9^{9}}} too.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from rewards.expression import Node, variables

Number: TypeAlias = float | complex

EXACT = 1e-9  # relative difference of values that differ by rounding only
_WANTED_POINTS = 4
_NO_VALUES: Mapping[str, Number] = {}


class NoValue(ValueError):
    """An expression that has no finite value: a division by zero, a number out of range, a variable without value."""


def value(node: Node, values: Mapping[str, Number] = _NO_VALUES) -> Number:
    """Return the value of a tree.

    Args:
        node: The tree.
        values: Values of its variables.

    Raises:
        NoValue: It has none that is finite.
    """
    try:
        result = _value(node, values, 1.0)
    except (ArithmeticError, ValueError, TypeError) as error:
        raise NoValue(str(error)) from error
    if isinstance(result, complex):
        if abs(result.imag) <= 1e-12 * abs(result):
            result = result.real
        elif not cmath.isfinite(result):
            raise NoValue("out of range")
    if isinstance(result, float) and math.isnan(result):
        raise NoValue("not a number")
    return result


Equality: TypeAlias = Literal["same", "different", "same_where_positive", "unknown"]


def compare(first: Node, second: Node) -> Equality:
    """Compare two expressions by their values at fixed points.

    Returns:
        `same_where_positive` if they agree at all points with positive variables and differ elsewhere, as sqrt(x^2) and
        x; `unknown` where too few points have values.
    """
    names = sorted(variables(first) | variables(second))
    if variables(first) != variables(second) and not _vanish(first, second):
        return "different"
    agreed = {True: 0, False: 0}
    for point in range(10):
        positive = point < 6
        values = {name: _coordinate(point, index, positive) for index, name in enumerate(names)}
        try:
            a, b = value(first, values), value(second, values)
        except NoValue:
            continue
        if not close(a, b, EXACT):
            return "same_where_positive" if not positive and agreed[True] >= _WANTED_POINTS else "different"
        agreed[positive] += 1
    return "same" if agreed[True] >= _WANTED_POINTS else "unknown"


def close(a: Number, b: Number, tolerance: float) -> bool:
    """Return whether |a - b| / (|b| + 1e-6) is below a tolerance. Infinite numbers are close to themselves only."""
    if a == b:
        return True
    difference = abs(a - b) / (abs(b) + 1e-6)
    return difference < tolerance  # false for NaN


def _coordinate(point: int, index: int, positive: bool) -> float:
    """Return an irrational coordinate from 0.3 to 2.8, or its negative for some of the others."""
    size = 0.3 + 2.5 * ((point + 1) * 0.7548776662 + (index + 1) * 0.5698402910) % 2.5
    return size if positive or (point + index) % 2 else -size


def _vanish(first: Node, second: Node) -> bool:
    """Return whether a variable that only one expression has can be without effect, as in x - x."""
    return bool(variables(first) & variables(second)) or not (variables(first) and variables(second))


def _value(node: Node, values: Mapping[str, Number], degree: float) -> Number:
    kind = node[0]
    if kind == "num":
        number: float = node[1]
        if math.isinf(number):
            raise OverflowError("out of range")
        return number
    if kind == "var":
        if node[1] not in values:
            raise ValueError(f"{node[1]} has no value")
        return values[node[1]]
    if kind == "const":
        return _CONSTANTS[node[1]]
    if kind in _TRIGONOMETRIC:
        return _TRIGONOMETRIC[kind](_value(node[1], values, math.pi / 180))
    if kind == "°":
        return _value(node[1], values, degree) * degree
    return _OPERATORS[kind](*(_value(part, values, degree) for part in node[1:]))


def _power(base: Number, exponent: Number) -> Number:
    return base**exponent


def _divide(a: Number, b: Number) -> Number:
    return a / b


def _root(degree: Number, x: Number) -> Number:
    if isinstance(x, float) and isinstance(degree, float) and x < 0 and degree % 2 == 1:
        return -((-x) ** (1 / degree))  # the real root
    return x ** (1 / degree)


def _sqrt(x: Number) -> Number:
    return math.sqrt(x) if isinstance(x, float) and x >= 0 else cmath.sqrt(x)


def _log(x: Number) -> Number:
    return math.log(x) if isinstance(x, float) and x > 0 else cmath.log(x)


def _factorial(n: Number) -> float:
    if not isinstance(n, float) or n < 0 or n != int(n):
        raise ValueError("a factorial of no whole number")
    return math.gamma(n + 1)  # overflows beyond 170


def _binomial(n: Number, k: Number) -> float:
    if not (isinstance(n, float) and isinstance(k, float)) or n != int(n) or k != int(k) or n < 0:
        raise ValueError("a binomial of no whole numbers")
    if not 0 <= k <= n:
        return 0.0
    if n <= 1000:
        return float(math.comb(int(n), int(k)))
    return math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1))


def _real_or_complex(real: Callable[[float], float], other: Callable[[complex], complex]) -> Callable[[Number], Number]:
    def apply(x: Number) -> Number:
        if isinstance(x, float):
            try:
                return real(x)
            except ValueError:
                return other(x)
        return other(x)

    return apply


_sin = _real_or_complex(math.sin, cmath.sin)
_cos = _real_or_complex(math.cos, cmath.cos)
_tan = _real_or_complex(math.tan, cmath.tan)
_CONSTANTS: dict[str, Number] = {"π": math.pi, "e": math.e, "i": 1j, "∞": math.inf}
_TRIGONOMETRIC: dict[str, Callable[[Number], Number]] = {
    "sin": _sin,
    "cos": _cos,
    "tan": _tan,
    "cot": lambda x: 1 / _tan(x),
    "sec": lambda x: 1 / _cos(x),
    "csc": lambda x: 1 / _sin(x),
}
_arcsin, _arccos, _arctan = (
    _real_or_complex(getattr(math, name), getattr(cmath, name)) for name in ("asin", "acos", "atan")
)
_OPERATORS: dict[str, Callable[..., Number]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": _divide,
    "neg": lambda a: -a,
    "^": _power,
    "!": _factorial,
    "%": lambda a: a / 100,
    "abs": abs,
    "sqrt": _sqrt,
    "cbrt": lambda x: _root(3.0, x),
    "root": _root,
    "binom": _binomial,
    "ln": _log,
    "lg": lambda x: _log(x) / math.log(10),
    "log": lambda *args: _log(args[-1]) / (math.log(10) if len(args) == 1 else _log(args[0])),
    "exp": _real_or_complex(math.exp, cmath.exp),
    "arcsin": _arcsin,
    "asin": _arcsin,
    "arccos": _arccos,
    "acos": _arccos,
    "arctan": _arctan,
    "atan": _arctan,
    "sinh": _real_or_complex(math.sinh, cmath.sinh),
    "cosh": _real_or_complex(math.cosh, cmath.cosh),
    "tanh": _real_or_complex(math.tanh, cmath.tanh),
}
