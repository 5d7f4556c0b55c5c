"""What a verifier is, and its settings.

class Exact:
    name = "exact"
    settings = {"ignore_case": False}                  # every setting with its default, which also says its type

    def check(self, item): check_settings(self, item)  # when data is built: raises RewardError
    def check_values(self, item): ...                  # if its settings have other bounds than their types
    def score(self, answer, item): ...                 # when it is trained on: never raises

A new verifier is a module in rewards/verifiers/ and a line in `rewards.table`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from common.nearest import suggestion
from rewards.verdict import Item, Outcome, RewardError

SHARES = ("tolerance", "iou")  # settings that are shares: 5 for 5% would make nearly all answers right, or none


class Verifier(Protocol):
    """Compares an answer with a reference. It keeps no state: the same arguments give the same outcome."""

    @property
    def name(self) -> str:
        """Its name in records, registries and tables."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Every setting with its default."""
        ...

    def check(self, item: Item) -> None:
        """Check an item when data is built.

        Raises:
            RewardError: The reference cannot be parsed, or a setting is unknown or has a wrong value.
        """
        ...

    def score(self, answer: str, item: Item) -> Outcome:
        """Score an extracted answer. Nothing that an answer holds raises, is evaluated or takes long."""
        ...


def setting(verifier: Verifier, item: Item, name: str) -> Any:
    """Return a setting of an item, or its default."""
    return item.settings.get(name, verifier.settings[name])


def check_settings(verifier: Verifier, item: Item) -> None:
    """Check the settings of an item, whatever its reference is.

    Raises:
        RewardError: A setting is unknown, its value has not the type of its default (a whole number may stand where
            the default is a float), a number is negative or not finite, or the verifier refuses a value.
    """
    for name, value in item.settings.items():
        if name not in verifier.settings:
            known = ", ".join(verifier.settings) or "none"
            hint = suggestion(name, verifier.settings) or f": its settings are {known}"
            raise RewardError(f"{verifier.name} has no setting {name!r}{hint}")
        wanted = type(verifier.settings[name])
        if wanted is type(None):  # the verifier checks its value
            continue
        fits = type(value) is wanted or (wanted is float and type(value) is int)
        if not fits:
            raise RewardError(f"{verifier.name}: the setting {name} is {value!r}, not of type {wanted.__name__}")
        if wanted is float and not 0 <= value < math.inf:
            raise RewardError(f"{verifier.name}: the setting {name} is {value}: give 0 or a positive number")
        if name in SHARES and value >= 1:
            raise RewardError(f"{verifier.name}: the setting {name} is {value}, not from 0 to below 1")
    if check_values := getattr(verifier, "check_values", None):
        check_values(item)
