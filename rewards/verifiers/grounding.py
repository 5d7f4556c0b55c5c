"""grounding: the share of boxes that are found.

Pairs of a given and a wanted box with an IoU above `iou`, each box in one pair at most, per max(given, wanted). What is
no box (corners in a wrong order, outside 0..1000, not four numbers) counts as given. Nothing wanted and nothing given
is 1. The reference is written as boxes are, "[[x1,y1,x2,y2],...]"; "[]" says that there is nothing to find.

Reasons: boxes, nothing, no_box, too_many.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from rewards.boxes import LARGEST, Box, boxes_in, matches, says_none
from rewards.verdict import Item, Outcome, RewardError, Verdict
from rewards.verifier import check_settings, setting

MAX_BOXES = 1000


class Grounding:
    """Boxes above a threshold of IoU per number of boxes."""

    name = "grounding"
    settings: Mapping[str, Any] = {"iou": 0.5}

    def check(self, item: Item) -> None:
        check_settings(self, item)
        boxes = boxes_in(item.reference)
        if None in boxes or not (boxes or (item.reference.strip() and says_none(item.reference))):
            raise RewardError(
                f"grounding: the reference {item.reference[:100]!r} is not a list of boxes [x1,y1,x2,y2] within "
                f"0..{LARGEST}, with x1 < x2 and y1 < y2"
            )
        if boxes and all(max(box) <= 1 for box in _valid(boxes)):
            raise RewardError(
                f"grounding: the reference {item.reference[:100]!r} has fractions of the image: multiply them by "
                f"{LARGEST}"
            )
        if len(boxes) > MAX_BOXES:
            raise RewardError(f"grounding: the reference has {len(boxes):,} boxes, at most {MAX_BOXES:,}")

    def score(self, answer: str, item: Item) -> Outcome:
        wanted = _wanted(item.reference)
        given = boxes_in(answer)
        if not given and not says_none(answer):
            return Verdict(0.0, "no_box")
        if not given or not wanted:
            return Verdict(float(len(given) == len(wanted)), "nothing")
        if len(given) > MAX_BOXES:
            return Verdict(0.0, "too_many")
        found = matches(_valid(given), wanted, setting(self, item, "iou"))
        return Verdict(found / max(len(given), len(wanted)), "boxes")


@lru_cache(maxsize=4096)
def _wanted(reference: str) -> list[Box]:
    """Return the boxes of a reference, which many answers are compared with."""
    return _valid(boxes_in(reference))


def _valid(boxes: list[Box | None]) -> list[Box]:
    return [box for box in boxes if box is not None]
