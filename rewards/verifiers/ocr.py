"""ocr: how much of a transcription is right, from the edits between both texts.

1 - edits / length of the longer, without white space, in NFC. Two empty texts are equal. Case counts unless
`ignore_case`. A long wrong text costs as much as it has letters, so that repetition does not pay.

Reasons: equal, edits, too_long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewards.plain_text import composed
from rewards.similarity import comparable, edit_similarity
from rewards.verdict import Item, Outcome, RewardError, Verdict
from rewards.verifier import check_settings, setting

MAX_CHARACTERS = 100_000  # a dense page has 10,000


class Ocr:
    """The share of letters that need no edit."""

    name = "ocr"
    settings: Mapping[str, Any] = {"ignore_case": False}

    def check(self, item: Item) -> None:
        check_settings(self, item)
        if len(item.reference) > MAX_CHARACTERS:
            raise RewardError(f"ocr: the reference has {len(item.reference):,} characters, at most {MAX_CHARACTERS:,}")

    def score(self, answer: str, item: Item) -> Outcome:
        ignore_case = setting(self, item, "ignore_case")
        given, wanted = (_letters(text, ignore_case) for text in (answer, item.reference))
        if given == wanted:
            return Verdict(1.0, "equal")
        if not comparable(given, wanted):
            return Verdict(0.0, "too_long")
        return Verdict(edit_similarity(given, wanted), "edits")


def _letters(text: str, ignore_case: bool) -> str:
    """Return a text without white space."""
    return "".join(composed(text.lower() if ignore_case else text).split())
