"""video: short answers about a video, its moments and its intervals.

A reference that is an interval ("[12, 15.5]", "00:10 - 00:20", "from 10 to 20 s") is compared in seconds:

    interval: iou      seconds in both / seconds in either; several intervals count together
              exact    1 if starts and ends are equal, else 0
              text     the reference is no interval, though it looks like one ("3-2")

An answer that is no interval, or ends before it begins, scores 0 then. A reference that is a moment with a unit or on a
clock ("0:15", "15 s") is compared in seconds too. All other references are compared as `vqa` does.

Reasons: interval, no_interval, moment, and those of `rewards.verifiers.text`. A judge is asked for: text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewards.intervals import Interval, intervals_in, is_empty_interval, length, moment_in, temporal_iou
from rewards.verdict import Item, Outcome, RewardError, Verdict
from rewards.verifier import setting
from rewards.verifiers.text import Text

INTERVAL_MODES = ("iou", "exact", "text")


class Video(Text):
    """As vqa, and in seconds where the reference is a time."""

    settings: Mapping[str, Any] = {**Text.settings, "interval": "iou"}

    def __init__(self) -> None:
        super().__init__("video")

    def check(self, item: Item) -> None:
        super().check(item)
        mode = setting(self, item, "interval")
        if item.settings.get("interval", "text") != "text" and not _wanted(item.reference):
            raise RewardError(f"video: the reference {item.reference[:100]!r} is not an interval such as [10, 20]")
        if mode != "text" and _wanted(item.reference) is None and is_empty_interval(item.reference):
            raise RewardError(
                f"video: the reference {item.reference[:100]!r} has no length or ends before it begins; if it is no "
                "interval, set interval to text"
            )

    def check_values(self, item: Item) -> None:
        super().check_values(item)
        if (mode := setting(self, item, "interval")) not in INTERVAL_MODES:
            raise RewardError(f"video: the setting interval is {mode!r}, not one of {', '.join(INTERVAL_MODES)}")

    def score(self, answer: str, item: Item) -> Outcome:
        mode = setting(self, item, "interval")
        wanted = _wanted(item.reference) if mode != "text" else None
        if wanted:
            given = intervals_in(answer)
            if given is None:
                return Verdict(0.0, "no_interval")
            return Verdict(temporal_iou(given, wanted) if mode == "iou" else float(given == wanted), "interval")
        moment = moment_in(item.reference)
        given_moment = moment_in(answer) if moment and moment.unit else None
        if moment and given_moment:
            difference = abs(moment.seconds - given_moment.seconds)
            return Verdict(float(difference <= moment.seconds * setting(self, item, "tolerance")), "moment")
        return super().score(answer, item)


def _wanted(reference: str) -> list[Interval] | None:
    """Return the intervals of a reference; None if it has none with a length."""
    intervals = intervals_in(reference)
    return intervals if intervals and all(length([interval]) for interval in intervals) else None
