"""geoguess: where a photograph was taken, for a judge who gives a score.

The judge answers {"score": 0.6}, where

    0.1    the country is right           0.25   the province or state         0.5    the city
and up to 0.5 is added for the name of the place.

The reference is {"place_name": "Eiffel Tower", "address": "Paris, France"}. An answer of more than 50 characters scores
0: it names a place, and lists of guesses are no answer.

Reasons: empty, too_long. A judge is asked for: place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewards.strict_json import read_json
from rewards.verdict import Ask, Item, Outcome, RewardError, Verdict
from rewards.verifier import check_settings

MAX_CHARACTERS = 50
KEYS = ("place_name", "address")


class Geoguess:
    """A place, for a judge to compare with name and address."""

    name = "geoguess"
    settings: Mapping[str, Any] = {}

    def check(self, item: Item) -> None:
        check_settings(self, item)
        place_of(item.reference)

    def score(self, answer: str, item: Item) -> Outcome:
        if not answer.strip():
            return Verdict(0.0, "empty")
        return Verdict(0.0, "too_long") if len(answer.strip()) > MAX_CHARACTERS else Ask("place")


def place_of(reference: str) -> dict[str, str]:
    """Return place_name and address of a reference.

    Raises:
        RewardError: It is not a JSON object with exactly these two texts, or both are empty.
    """
    place = read_json(reference)
    if (
        not isinstance(place, dict)
        or set(place) != set(KEYS)
        or not all(isinstance(text, str) for text in place.values())
        or not any(text.strip() for text in place.values())
    ):
        raise RewardError(f'geoguess: the reference is {reference[:100]!r}, not {{"place_name": ..., "address": ...}}')
    return place
