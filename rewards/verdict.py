"""What a verifier is given and what it answers.

Item("How many dots?", "7")            the question, the reference, the settings of the verifier
Verdict(1.0, "equal")                  a score from 0 to 1, and the rule that gave it
Ask("text")                            no rule decides: a judge must be asked
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


class RewardError(ValueError):
    """A reference, a setting, a record or a registry that cannot be used. The message is one line."""


@dataclass(frozen=True)
class Item:
    """What a verifier knows beside the answer."""

    question: str = ""
    reference: str = ""
    settings: Mapping[str, Any] = field(default_factory=lambda: NO_SETTINGS)  # by name; those not given have defaults


@dataclass(frozen=True)
class Verdict:
    """A score and its reason.

    Attributes:
        score: From 0 to 1.
        reason: The rule that decided, in words joined by underscores. Each module has a closed list of its reasons, so
            that they can be counted.
    """

    score: float
    reason: str

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1:  # false for NaN too
            raise ValueError(f"a score of {self.score} ({self.reason}) is not between 0 and 1")


@dataclass(frozen=True)
class Ask:
    """No rule decides: a judge must be asked. The reason names what was compared, such as `text`."""

    reason: str


Outcome: TypeAlias = Verdict | Ask
