"""Intervals in which the numbers of a configuration must lie. Every bound excludes nan and infinity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from model.config import ConfigError


class Bound(NamedTuple):
    """A test of a finite number, and how to ask for one that passes."""

    holds: Callable[[float], bool]
    wanted: str


POSITIVE = Bound(lambda value: value > 0, "a positive number")
NOT_NEGATIVE = Bound(lambda value: value >= 0, "0 or a positive number")
FRACTION = Bound(lambda value: 0 <= value < 1, "a number from 0 to below 1")
SHARE = Bound(lambda value: 0 <= value <= 1, "a number from 0 to 1")


def check_bounds(section: str, values: Any, bounds: Mapping[str, Bound]) -> None:
    """Check the numbers of a section.

    Args:
        section: its name in the configuration.
        values: its dataclass.
        bounds: what holds for each key.

    Raises:
        ConfigError: a number is outside its bound, nan or infinite.
    """
    for key, bound in bounds.items():
        value = getattr(values, key)
        if not (math.isfinite(value) and bound.holds(value)):
            raise ConfigError(f"{section}.{key}={value}: give {bound.wanted}")
