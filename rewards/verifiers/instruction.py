"""instruction: whether a text has the form that an instruction asks for.

The text is all that follows the thought; it has no box.

The reference is a JSON list of constraints (`rewards.constraints`): 1 if all are met, else 0. With `partial: true`, the
share that is met.

Reasons: all_met, not_met, empty, too_long.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from rewards.constraints import Constraint, met, read
from rewards.verdict import Item, Outcome, Verdict
from rewards.verifier import check_settings, setting

MAX_CHARACTERS = 2_000_000


class Instruction:
    """Constraints on the form of a text."""

    name = "instruction"
    settings: Mapping[str, Any] = {"partial": False}

    def check(self, item: Item) -> None:
        check_settings(self, item)
        read(item.reference)

    def score(self, answer: str, item: Item) -> Outcome:
        if not answer.strip():
            return Verdict(0.0, "empty")
        if len(answer) > MAX_CHARACTERS:
            return Verdict(0.0, "too_long")
        results = [met(answer, constraint) for constraint in _constraints(item.reference)]
        if all(results):
            return Verdict(1.0, "all_met")
        return Verdict(sum(results) / len(results) if setting(self, item, "partial") else 0.0, "not_met")


@lru_cache(maxsize=1024)
def _constraints(reference: str) -> tuple[Constraint, ...]:
    return tuple(read(reference))
