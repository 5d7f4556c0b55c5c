"""Moments and intervals of a video in an answer, in seconds.

"12.0-15.5", "[12, 15.5]", "from 12 to 15.5 s"   ->   [(12.0, 15.5)]
"00:10 - 01:02:03"                               ->   [(10.0, 3723.0)]           mm:ss, hh:mm:ss
"1 to 2 minutes", "60000 to 120000 ms"           ->   [(60.0, 120.0)]
"[[1, 2], [5, 8]]"                               ->   [(1.0, 2.0), (5.0, 8.0)]
"0:15", "15 s", "15"                             ->   a moment, 15.0, and no interval
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rewards.plain_text import half_width

Interval: TypeAlias = tuple[float, float]

MAX_CHARACTERS = 2000
_NUMBER = r"\d{1,9}(?:\.\d{0,9})?"
_UNITS = {
    3600.0: r"h(?:ours?|rs?)?|小时",
    60.0: r"m(?:in(?:ute)?s?)?|分钟|分",
    1.0: r"s(?:ec(?:ond)?s?)?|秒",
    0.001: r"ms|milliseconds?|毫秒",
}
_UNIT = "|".join(_UNITS.values())
_CLOCK = re.compile(r"(?:(\d{1,3}):)?(\d{1,4}):(\d{2}(?:\.\d{1,9})?)(?![\d:])")
_AMOUNT = re.compile(rf" *({_NUMBER})(?![\d:])(?:\s*({_UNIT})(?![a-z]))?")
_JOIN = re.compile(r"\s*(?:->|[-–—~,;→至到]|\b(?:to|until|till|and|through)\b)\s*")
_FILLER = re.compile(
    r"[][(){}<>\s\"'=:.从第在]+|\b(?:from|between|at|about|around|approximately|the|timestamps?|times?|interval|segment"
    r"|starts?|ends?|start_time|end_time|seconds?|secs?|s)\b"
)


@dataclass(frozen=True)
class Moment:
    """A time, and the factor of its unit: 0 where only a number is written, 1 for a clock's time."""

    seconds: float
    unit: float


def moment_in(text: str) -> Moment | None:
    """Return the moment that a text is; None if it is anything else."""
    times = _times(text)
    return times[0] if times is not None and len(times) == 1 else None


def intervals_in(text: str) -> list[Interval] | None:
    """Return the intervals that a text is; None if it is anything else, or one ends before it begins."""
    times = _times(text)
    if not times or len(times) % 2:
        return None
    pairs = [_interval(*times[i : i + 2]) for i in range(0, len(times), 2)]
    return None if any(start > end for start, end in pairs) else pairs


def is_empty_interval(text: str) -> bool:
    """Return whether a text is an interval by its brackets, units or clock, and has no length: "[20, 10]", "5 s - 5 s".

    "3-2" may be anything.
    """
    times = _times(text)
    if not times or len(times) != 2 or not (text.lstrip().startswith("[") or any(time.unit for time in times)):
        return False
    start, end = _interval(*times)
    return start >= end


def temporal_iou(given: Sequence[Interval], wanted: Sequence[Interval]) -> float:
    """Return the seconds that are in both lists of intervals / those in either; 0 if there are none.

    >>> temporal_iou([(10, 20)], [(15, 25)]) == 5 / 15
    True
    """
    shared = length([(max(a, c), min(b, d)) for a, b in merged(given) for c, d in merged(wanted)])
    either = length(merged([*given, *wanted]))
    return shared / either if either else 0.0


def length(intervals: Sequence[Interval]) -> float:
    """Return the seconds of intervals that do not overlap; those that end before they begin count as empty."""
    return sum(max(0.0, end - start) for start, end in intervals)


def merged(intervals: Sequence[Interval]) -> list[Interval]:
    """Return the same seconds as intervals that do not overlap, in order."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def _interval(start: Moment, end: Moment) -> Interval:
    """Return an interval; "1 to 2 minutes" gives its start the unit of its end."""
    factor = end.unit if start.unit == 0 and end.unit not in (0, 1) else 1.0
    return start.seconds * factor, end.seconds


def _times(text: str) -> list[Moment] | None:
    """Return the times of a text that has nothing else but brackets, words such as "from", and one join between two."""
    text = half_width(text).casefold().strip()
    if len(text) > MAX_CHARACTERS:
        return None
    times: list[Moment] = []
    joined = True  # a join is allowed only after a time
    at = 0
    while at < len(text):
        if time := _time_at(text, at):
            moment, at = time
            times.append(moment)
            joined = False
        elif not joined and (found := _JOIN.match(text, at)):
            joined, at = True, found.end()
        elif found := _FILLER.match(text, at):
            at = found.end()
        else:
            return None
    return None if joined else times


def _time_at(text: str, at: int) -> tuple[Moment, int] | None:
    """Return the time that starts at an index, and where it ends."""
    if found := _CLOCK.match(text, at):
        hours, minutes, seconds = found.groups()
        if float(seconds) >= 60 or (hours and int(minutes) >= 60):
            return None
        return Moment(int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds), 1.0), found.end()
    found = _AMOUNT.match(text, at)
    if found is None:
        return None
    unit = _factor(found[2])
    total = float(found[1]) * (unit or 1)
    while unit and (more := _AMOUNT.match(text, found.end())):  # "1 min 5 s"
        smaller = _factor(more[2])
        if not 0 < smaller < unit:
            break
        total, unit, found = total + float(more[1]) * smaller, smaller, more
    return Moment(total, unit), found.end()


def _factor(unit: str | None) -> float:
    """Return the seconds of a unit; 0 for none."""
    return next((factor for factor, words in _UNITS.items() if unit and re.fullmatch(words, unit)), 0.0)
