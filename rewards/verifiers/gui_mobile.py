"""gui_mobile: AndroidWorld's actions, JSON objects such as {"action_type": "click", "box_2d": [[100,100,200,200]]}.

Python's spelling is read too, as agents are trained to write it: single quotes, True, None, and 007 for 7.

An answer with the same keys scores the product over the keys:

    box_2d   IoU of the one box [[x1,y1,x2,y2]], whole numbers 0..999 with x1 < x2 and y1 < y2
    text     common subsequence / length of the longer
    others   1 if equal, else 0

The text of an `answer` is for a reader: equal or decided as `general` decides, else a judge is asked. What an
environment could not read (no JSON, a key twice, no box) scores 0.

Reasons: not_json, keys, action, bad_box, equal, product, and those of `rewards.verifiers.text`. A judge
is asked for: text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewards.boxes import Box, ious
from rewards.plain_text import composed
from rewards.similarity import common_subsequence
from rewards.strict_json import NOT_JSON, read_literal
from rewards.verdict import Item, Outcome, RewardError, Verdict
from rewards.verifier import check_settings
from rewards.verifiers.text import compare

LARGEST = 999
MAX_CHARACTERS = 20_000
ACTION, BOX, TEXT = "action_type", "box_2d", "text"


class GuiMobile:
    """An action on a telephone."""

    name = "gui_mobile"
    settings: Mapping[str, Any] = {}

    def check(self, item: Item) -> None:
        check_settings(self, item)
        wanted = read_literal(item.reference)
        if not isinstance(wanted, dict) or not isinstance(wanted.get(ACTION), str):
            raise RewardError(f"gui_mobile: the reference {item.reference[:100]!r} is no JSON object with {ACTION!r}")
        if BOX in wanted and _box(wanted[BOX]) is None:
            raise RewardError(
                f"gui_mobile: {BOX} of the reference is {wanted[BOX]!r}, not [[x1,y1,x2,y2]] of whole numbers within "
                f"0..{LARGEST}, with x1 < x2 and y1 < y2"
            )
        if TEXT in wanted and not isinstance(wanted[TEXT], str):
            raise RewardError(f"gui_mobile: {TEXT} of the reference is {wanted[TEXT]!r}, not a text")

    def score(self, answer: str, item: Item) -> Outcome:
        wanted = read_literal(item.reference)
        given = read_literal(answer) if len(answer) <= MAX_CHARACTERS else NOT_JSON
        if not isinstance(given, dict):
            return Verdict(0.0, "not_json")
        if given.keys() != wanted.keys():
            return Verdict(0.0, "keys")
        if not all(_equal(given[key], value) for key, value in wanted.items() if key not in (BOX, TEXT)):
            return Verdict(0.0, "action")
        share = _box_iou(given[BOX], wanted[BOX]) if BOX in wanted else 1.0
        if share == 0 or (TEXT in wanted and not isinstance(given[TEXT], str)):
            return Verdict(0.0, "bad_box" if share == 0 else "action")
        if TEXT not in wanted or composed(given[TEXT]) == composed(wanted[TEXT]):
            return Verdict(share, "equal" if share == 1 else "product")
        if wanted[ACTION] == "answer":
            return compare(given[TEXT], wanted[TEXT])
        return Verdict(share * common_subsequence(composed(given[TEXT]), composed(wanted[TEXT])), "product")


def _box(value: Any) -> Box | None:
    """Return the box of [[x1,y1,x2,y2]]; None for anything else."""
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], list) or len(value[0]) != 4:
        return None
    x1, y1, x2, y2 = value[0]
    if not all(type(number) is int and 0 <= number <= LARGEST for number in value[0]):
        return None
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _box_iou(given: Any, wanted: Any) -> float:
    box, target = _box(given), _box(wanted)
    return float(ious([box], [target])[0, 0]) if box and target else 0.0


def _equal(a: Any, b: Any) -> bool:
    """Return whether two values are equal and of one type: true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)
