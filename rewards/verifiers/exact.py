"""exact: the same text, up to Unicode's composed forms and white space.

Reasons: equal, different.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewards.plain_text import composed
from rewards.verdict import Item, Outcome, RewardError, Verdict
from rewards.verifier import check_settings, setting


class Exact:
    """1 if answer and reference are the same text, else 0."""

    name = "exact"
    settings: Mapping[str, Any] = {"ignore_case": False}

    def check(self, item: Item) -> None:
        check_settings(self, item)
        if not item.reference.strip():
            raise RewardError("exact: the reference is empty")

    def score(self, answer: str, item: Item) -> Outcome:
        given, wanted = normal(answer), normal(item.reference)
        if setting(self, item, "ignore_case"):
            given, wanted = given.casefold(), wanted.casefold()
        return Verdict(1.0, "equal") if given == wanted else Verdict(0.0, "different")


def normal(text: str) -> str:
    """Return a text in NFC, with one space for all white space, and none at its ends."""
    return " ".join(composed(text).split())
