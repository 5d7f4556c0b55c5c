"""Moments and intervals in answers, temporal IoU against counted ticks, and the video verifier."""

from __future__ import annotations

import random
from typing import Any

import pytest

from rewards.intervals import Interval, intervals_in, moment_in, temporal_iou
from rewards.table import VERIFIERS
from rewards.verdict import Ask, Item, RewardError, Verdict

pytestmark = pytest.mark.fast
VIDEO = VERIFIERS["video"]


@pytest.mark.parametrize(
    ("text", "intervals"),
    [
        *(
            (text, [(10, 20)])
            for text in (
                "[10, 20]",
                "10-20",
                "10 - 20",
                "10–20",
                "10—20",
                "10~20",
                "(10, 20)",
                "<10, 20>",
                "[[10, 20]]",
                "10 20",
                "[10.0,20.00]",
                "10s to 20s",
                "10 s - 20 s",
                "10 to 20 seconds",
                "from 10 to 20",
                "From 10 seconds to 20 seconds.",
                "between 10 and 20 s",
                "10.0 sec until 20.0 sec",
                "00:10-00:20",
                "0:10 to 0:20",
                "00:00:10 - 00:00:20",
                "from 00:10 to 20 s",
                '{"start": 10, "end": 20}',
                "start: 10, end: 20",
                "10秒到20秒",
                "第10秒至第20秒",
                "１０－２０",
            )
        ),
        ("12.0-15.5", [(12, 15.5)]),
        ("1:02:03 - 1:02:04.5", [(3723, 3724.5)]),
        ("1 to 2 minutes", [(60, 120)]),
        ("1 min 30 s to 2 min", [(90, 120)]),
        ("1m30s-2m5s", [(90, 125)]),
        ("90:00 - 91:30", [(5400, 5490)]),
        ("[[1, 2], [5, 8]]", [(1, 2), (5, 8)]),
        ("1-2, 5-8", [(1, 2), (5, 8)]),
        ("[10, 10]", [(10, 10)]),
        *(
            (text, None)
            for text in (
                "20-10",
                "[20, 10]",
                "15",
                "15 s",
                "0:15",
                "10-20-30",
                "-10, 20",
                "[-10, 20]",
                "10--20",
                "10-",
                "-",
                "",
                "[]",
                "the dog jumps",
                "10 to 20 dogs",
                "at 10:75",
                "1:60:00 - 2:00:00",
                "10 or 20",
                "10 to the end",
                "nan-inf",
                "1e3-2e3",
                "10,000 - 20",
                "[5, 8, 1, 2, 3]",
                "[1, 2], [8, 5]",
                "10" * 2000,
            )
        ),
    ],
)
def test_intervals_in(text: str, intervals: list[Interval] | None) -> None:
    assert intervals_in(text) == intervals


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("15", 15),
        ("15 s", 15),
        ("0:15", 15),
        ("at 00:00:15", 15),
        ("1.5 min", 90),
        ("1 h 1 min 1 s", 3661),
        ("10-20", None),
        ("dog", None),
    ],
)
def test_moment_in(text: str, seconds: float | None) -> None:
    moment = moment_in(text)
    assert (moment.seconds if moment else None) == seconds


def test_temporal_iou_is_the_share_of_ticks() -> None:
    rng = random.Random(0)

    def draw() -> list[Interval]:
        pairs = [sorted(rng.choices(range(40), k=2)) for _ in range(rng.randrange(1, 4))]
        return [(a / 4, b / 4) for a, b in pairs]

    def ticks(intervals: list[Interval]) -> set[int]:
        return {tick for a, b in intervals for tick in range(int(a * 4), int(b * 4))}

    for _ in range(500):
        a, b = draw(), draw()
        both, either = len(ticks(a) & ticks(b)), len(ticks(a) | ticks(b))
        assert temporal_iou(a, b) == pytest.approx(both / either if either else 0)


@pytest.mark.parametrize(
    ("answer", "reference", "settings", "score"),
    [
        ("[10, 20]", "[10, 20]", {}, 1),
        ("10-20", "[10, 20]", {"interval": "exact"}, 1),
        ("10-21", "[10, 20]", {"interval": "exact"}, 0),
        ("10-21", "[10, 20]", {}, 10 / 11),
        ("[0, 10]", "[10, 20]", {"interval": "iou"}, 0),  # they touch
        ("[12, 18]", "[10, 20]", {"interval": "iou"}, 0.6),  # inside
        ("[0:05, 0:25]", "[10, 20]", {"interval": "iou"}, 0.5),  # around
        ("[15, 15]", "[10, 20]", {"interval": "iou"}, 0),  # an instant
        ("[20, 10]", "[10, 20]", {"interval": "iou"}, 0),
        ("at the beginning", "[10, 20]", {"interval": "iou"}, 0),
        ("[1, 2], [5, 8]", "[[1, 2], [5, 8]]", {}, 1),
        ("[1, 8]", "[[1, 2], [5, 8]]", {}, 4 / 7),
        ("3-2", "3-2", {}, 1),  # a score of a game: no interval ends before it begins
        ("2-3", "3-2", {}, None),
        ("1-2", "2-3", {"interval": "text"}, None),
        ("2 - 3", "2-3", {"interval": "text"}, None),
        ("15 seconds", "0:15", {}, 1),
        ("15", "00:15", {}, 1),
        ("16", "0:15", {}, 0),
        ("16", "0:15", {"tolerance": 0.1}, 1),
        ("3", "3", {}, 1),
        ("three", "3", {}, 1),
        ("4", "3", {}, 0),
        ("a red car", "the red car", {}, 1),
        ("yes", "no", {}, 0),
        ("a blue car", "the red car", {}, None),
    ],
)
def test_video(answer: str, reference: str, settings: dict[str, Any], score: float | None) -> None:
    item = Item("", reference, settings)
    VIDEO.check(item)
    outcome = VIDEO.score(answer, item)
    if score is None:
        assert outcome == Ask("text")
    else:
        assert isinstance(outcome, Verdict)
        assert outcome.score == pytest.approx(score)


@pytest.mark.parametrize(
    ("reference", "settings", "words"),
    [
        ("[10, 20]", {"interval": "iuo"}, "not one of iou, exact, text"),
        ("at the start", {"interval": "iou"}, "is not an interval"),
        ("[20, 10]", {"interval": "exact"}, "is not an interval"),
        ("[10, 10]", {"interval": "iou"}, "is not an interval"),
        ("", {}, "is empty"),
    ],
)
def test_wrong_items_are_refused(reference: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RewardError, match=words):
        VIDEO.check(Item("", reference, settings))
