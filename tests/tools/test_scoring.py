"""Scores of answers against brute force: an edit distance by recursion, boxes by counting pixels."""

from __future__ import annotations

import itertools
import random
from functools import cache

import numpy as np
import pytest

from tools.scoring import (
    boxed_span,
    edit_similarity,
    final_answer,
    first_list_of_boxes,
    iou,
    match_boxes,
    same_result,
    score_boxed,
    score_boxes,
)

pytestmark = pytest.mark.fast


def edit_distance(a: str, b: str) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        changed = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, changed)

    return distance(len(a), len(b))


def test_edit_similarity_equals_brute_force() -> None:
    rng = random.Random(0)
    for _ in range(300):
        a, b = ("".join(rng.choices("abé字 ", k=rng.randrange(12))) for _ in range(2))
        longest = max(len(a), len(b))
        assert edit_similarity(a, b) == pytest.approx(1 - edit_distance(a, b) / longest if longest else 1)


def test_iou_equals_counted_pixels() -> None:
    rng = random.Random(1)
    for _ in range(300):
        boxes = []
        covered = np.zeros((2, 40, 40), bool)
        for image in covered:
            x1, x2, y1, y2 = (*sorted(rng.sample(range(40), 2)), *sorted(rng.sample(range(40), 2)))
            image[y1:y2, x1:x2] = True
            boxes.append((float(x1), float(y1), float(x2), float(y2)))
        assert iou(*boxes) == pytest.approx((covered[0] & covered[1]).sum() / (covered[0] | covered[1]).sum())
    assert iou((5, 5, 5, 9), (0, 0, 10, 10)) == 0
    assert iou((9, 9, 5, 5), (0, 0, 10, 10)) == 0


def test_boxes_far_apart_are_matched_as_brute_force_matches_them() -> None:
    """Each given box overlaps one expected box, in any order; missing and surplus boxes score 0."""
    expected = [(100.0 * n, 10.0, 100.0 * n + 50, 60.0) for n in range(4)]
    given = [(x1 + 4 * n, y1, x2 + 4 * n, y2) for n, (x1, y1, x2, y2) in enumerate(expected)]
    best = max(
        sum(itertools.starmap(iou, zip(order, expected, strict=True))) for order in itertools.permutations(given)
    )
    assert sum(match_boxes(given[::-1], expected)) == pytest.approx(best)
    assert score_boxes(given[:2], expected) == {
        "iou": pytest.approx((1 + iou(given[1], expected[1])) / 4),
        "found": 0.5,
    }
    assert score_boxes([*expected, expected[0]], expected) == {"iou": 0.8, "found": 0.8}
    assert score_boxes([], expected) == {"iou": 0.0, "found": 0.0}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("plain", "plain"),
        ("<think>a</think>\n b ", "b"),
        ("<think></think>\nb", "b"),
        ("<think>a</think>\n<answer>b <|begin_of_box|>7<|end_of_box|></answer>", "b <|begin_of_box|>7<|end_of_box|>"),
        ("<think>a</think><answer>cut of", "cut of"),
        ("<think>cut of", ""),
    ],
)
def test_final_answer_of_both_forms(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_exactly_one_closed_box_is_a_result() -> None:
    begin, end = "<|begin_of_box|>", "<|end_of_box|>"
    assert boxed_span(f"It is {begin} 7 {end}.") == "7"
    for wrong in (
        "7",
        f"{begin}7",
        f"7{end}",
        f"{begin}7{end}{begin}7{end}",
        f"{begin}{begin}7{end}",
        f"{end}7{begin}",
    ):
        assert boxed_span(wrong) is None
        assert score_boxed(wrong, "7") == {"well_formed": 0.0, "correct": 0.0}
    assert score_boxed(f"{begin}7.0{end}", "7") == {"well_formed": 1.0, "correct": 1.0}
    assert score_boxed(f"{begin}8{end}", "7") == {"well_formed": 1.0, "correct": 0.0}


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("1,234.50", "1234.5", True),
        ("0.5", "1/2", True),
        ("50%", "50", True),
        ("$3", "3.0", True),
        ("-2", "2", False),
        ("1,2", "12", False),
        ("1/0", "1/0", True),  # text
        ("A  Cat", "a cat", True),
        ("3 cats", "3", False),
        ("nan", "inf", False),
        ("", "0", False),
        ("7" * 5000, "7", False),  # more digits than Python reads as a number
        ("7" * 5000, "7" * 5000, True),
    ],
)
def test_results_are_compared_as_numbers_or_text(given: str, expected: str, same: bool) -> None:
    assert same_result(given, expected) is same


def test_first_list_ends_where_it_is_closed() -> None:
    assert first_list_of_boxes("[[1,2,3,4],[5,6,7,8]] and [[9,9,10,10]]") == [(1, 2, 3, 4), (5, 6, 7, 8)]
    assert first_list_of_boxes("[[1,2,3,4],[5,6") == [(1, 2, 3, 4)]
    assert first_list_of_boxes("none") == []
