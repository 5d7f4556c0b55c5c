"""Boxes in answers, IoU against counted pixels, the largest number of matches against scipy, and the verifier."""

from __future__ import annotations

import itertools
import json
import random
import time
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from rewards.boxes import Box, boxes_in, ious, matches, says_none
from rewards.table import VERIFIERS
from rewards.verdict import Item, RewardError, Verdict

pytestmark = pytest.mark.fast
GROUNDING = VERIFIERS["grounding"]
A, B = (100, 100, 300, 300), (500, 500, 600, 600)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[[100,100,300,300]]", [A]),
        ("[100, 100, 300, 300]", [A]),
        ("[ 100 ,100\n, 300,300 ]", [A]),
        ("(100, 100, 300, 300)", [A]),
        ("((100,100,300,300),(500,500,600,600))", [A, B]),
        ("<100,100,300,300>", [A]),
        ("{100,100,300,300}", [A]),
        ("【100,100,300,300】", [A]),
        ("［［１００，１００，３００，３００］］", [A]),
        ("[100 100 300 300]", [A]),
        ("100, 100, 300, 300", [A]),
        ("[100.0, 100.00, 300., 300]", [A]),
        ("The dog is at [[100,100,300,300]], the cat at [[500,500,600,600]].", [A, B]),
        ('[{"bbox_2d": [100,100,300,300], "label": "dog"}, {"bbox_2d": [500,500,600,600], "label": "cat 2"}]', [A, B]),
        ("[[100,100,300,300],[500,500,600,600]]", [A, B]),
        ("[[100,100,300,300]] [[500,500,600,600]]", [A, B]),
        ("[0,0,1000,1000]", [(0, 0, 1000, 1000)]),
        ("[0,0,1001,1000]", [None]),
        ("[-1,0,10,10]", [None]),
        ("[300,100,100,300]", [None]),
        ("[100,300,300,100]", [None]),
        ("[100,100,100,300]", [None]),  # no area
        ("[100,100,300]", [None]),
        ("[100,100,300,300,1]", [None]),
        ("[100,,300,300]", [None]),
        ("[1e2,100,300,300]", [None]),
        ("[nan,100,300,300]", [None]),
        ("[99999999,100,300,300]", [None]),
        ("[[100,100,300,300],[5,5]]", [A, None]),
        ("100, 100, 300, 300, 500, 500, 600, 600", []),
        ("[]", []),
        ("[[]]", []),
        ("at the left", []),
        ("[100,100,300,300", []),
        ("", []),
    ],
)
def test_boxes_in(text: str, boxes: list[Box | None]) -> None:
    assert boxes_in(text) == boxes


@pytest.mark.parametrize(
    "text", ["[]", "[[]]", "", " ", "None", "no boxes", "There is no dog.", "not visible", "没有", "()"]
)
def test_says_none(text: str) -> None:
    assert says_none(text)


@pytest.mark.parametrize("text", ["on the left", "dog", "[[a]]", "nowhere near", "a notebook"])
def test_does_not_say_none(text: str) -> None:
    assert not says_none(text)


def random_box(rng: random.Random, size: int) -> Box:
    x1, x2 = sorted(rng.sample(range(size + 1), 2))
    y1, y2 = sorted(rng.sample(range(size + 1), 2))
    return (x1, y1, x2, y2)


def test_iou_is_the_share_of_pixels() -> None:
    rng = random.Random(0)

    def pixels(box: Any) -> set[tuple[int, int]]:
        return set(itertools.product(range(box[0], box[2]), range(box[1], box[3])))

    for _ in range(200):
        box, others = random_box(rng, 12), [random_box(rng, 12) for _ in range(4)]
        expected = [len(pixels(box) & pixels(other)) / len(pixels(box) | pixels(other)) for other in others]
        np.testing.assert_allclose(ious([box], others)[:, 0], expected, rtol=1e-12)


def test_matches_are_the_most_that_any_assignment_has() -> None:
    rng = random.Random(1)
    better_than_greedy = 0
    for _ in range(400):
        size = rng.choice([8, 20])
        given, wanted = ([random_box(rng, size) for _ in range(rng.randrange(9))] for _ in range(2))
        threshold = rng.choice([0.0, 0.1, 0.3, 0.5])
        near = ious(given, wanted) > threshold
        rows, columns = linear_sum_assignment(near, maximize=True)
        expected = int(near[rows, columns].sum())
        assert matches(given, wanted, threshold) == expected
        taken: set[int] = set()
        for row in near:
            taken |= {next((j for j in np.flatnonzero(row).tolist() if j not in taken), -1)}
        better_than_greedy += expected > len(taken - {-1})
    assert better_than_greedy > 10


def test_many_boxes_take_little_time() -> None:
    rng = random.Random(2)
    crowd = [(x, y, x + 500, y + 500) for x, y in ((rng.randrange(30), rng.randrange(30)) for _ in range(1000))]
    strangers = [(900, 900, 910, 910 + i / 100) for i in range(500)]
    for given, wanted in ((crowd, crowd), (crowd[:500] + strangers, crowd)):
        start = time.process_time()
        found = matches(given, wanted, 0.5)
        assert time.process_time() - start < 5
        near = csr_array(ious(given, wanted) > 0.5)
        assert found == int((maximum_bipartite_matching(near) >= 0).sum())


@pytest.mark.parametrize(
    ("answer", "reference", "settings", "score"),
    [
        ("[[100,100,300,300]]", [A], {}, 1),
        ("[[100,100,300,200]]", [A], {}, 0),  # IoU 0.5 is not above 0.5
        ("[[100,100,300,201]]", [A], {}, 1),
        ("[[100,100,300,200]]", [A], {"iou": 0.49}, 1),
        ("[[100,100,300,260]]", [A], {"iou": 0.75}, 1),  # 0.8
        ("[[100,100,300,240]]", [A], {"iou": 0.75}, 0),  # 0.7
        ("[[299,299,900,900]]", [A], {"iou": 0}, 1),  # any overlap
        ("[[300,300,900,900]]", [A], {"iou": 0}, 0),  # corners that touch
        ("[[100,100,300,300]]", [A, B], {}, 1 / 2),
        ("[[100,100,300,300],[500,500,600,600]]", [A], {}, 1 / 2),
        ("[[100,100,300,300],[300,300,100,100]]", [A], {}, 1 / 2),
        ("[[100,100,300,300],[0,0,2000,2000],[1]]", [A, B], {}, 1 / 3),
        ("[[100,100,300,300],[100,100,300,300]]", [A, A], {}, 1),
        ("[[100,100,300,300]]", [A, A], {}, 1 / 2),
        # the first given box matches both wanted ones, the second only the first: a greedy match would find one
        ("[[0,0,100,100],[0,0,100,190]]", [(0, 0, 100, 150), (0, 0, 100, 60)], {"iou": 0.5}, 1),
        ("[]", [], {}, 1),
        ("none", [], {}, 1),
        ("[[100,100,300,300]]", [], {}, 0),
        ("on the left", [], {}, 0),
        ("[]", [A], {}, 0),
        ("none", [A], {}, 0),
        ("on the left", [A], {}, 0),
        ("[0.1,0.1,0.3,0.3]", [A], {}, 0),
        ("[10,10,30,30]", [A], {}, 0),
    ],
)
def test_grounding(answer: str, reference: list[Box], settings: dict[str, float], score: float) -> None:
    item = Item("", json.dumps(reference), settings)
    GROUNDING.check(item)
    outcome = GROUNDING.score(answer, item)
    assert isinstance(outcome, Verdict)
    assert outcome.score == pytest.approx(score)


@pytest.mark.parametrize(
    "reference", ["", "left", "[[300,300,100,100]]", "[[1,2,3]]", "[[0,0,1001,5]]", "[[1,2,3,4],[5,6]]"]
)
def test_wrong_reference_is_refused(reference: str) -> None:
    with pytest.raises(RewardError, match="is not a list of boxes"):
        GROUNDING.check(Item("", reference))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"iuo": 0.5}, "did you mean iou"),
        ({"iou": 1.0}, "below 1"),
        ({"iou": -0.1}, "give 0 or a positive number"),
        ({"iou": "0.5"}, "type float"),
    ],
)
def test_wrong_setting_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RewardError, match=words):
        GROUNDING.check(Item("", "[[1,1,2,2]]", settings))
