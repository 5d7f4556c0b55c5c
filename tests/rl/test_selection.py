"""The groups that are kept, against all subsets there are."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from rl.selection import count_groups, have_differences, select_groups

pytestmark = pytest.mark.fast


def exact_distance(group: np.ndarray) -> Fraction:
    return abs(sum(map(Fraction, group.tolist()), Fraction()) / len(group) - Fraction(1, 2))


@pytest.mark.parametrize("seed", range(60))
def test_kept_groups_are_the_most_even_of_all_subsets_and_the_first_of_equal_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups, size, wanted = int(rng.integers(1, 9)), int(rng.integers(2, 8)), int(rng.integers(0, 6))
    values = [0.0, 1.0] if seed % 2 else [0.0, 0.25, 0.5, 1.0]
    scores = rng.choice(values, (groups, size))
    valid = [number for number in range(groups) if len(set(scores[number])) > 1]
    count = min(wanted, len(valid))
    distance = [exact_distance(group) for group in scores]
    best = min(combinations(valid, count), key=lambda subset: (sorted(distance[g] for g in subset), subset))
    kept = select_groups(scores, wanted)
    assert kept.dtype == np.int64
    assert kept.tolist() == list(best)


def test_example_of_the_docstring() -> None:
    scores = [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert select_groups(np.array(scores), 2).tolist() == [1, 2]


@pytest.mark.parametrize("size", range(2, 20))
def test_one_right_is_as_even_as_one_wrong_at_every_size(size: int) -> None:
    one_right, one_wrong = np.zeros(size), np.ones(size)
    one_right[0], one_wrong[0] = 1, 0
    assert select_groups(np.array([one_right, one_wrong]), 1).tolist() == [0]
    assert select_groups(np.array([one_wrong, one_right]), 1).tolist() == [0]


def test_rounding_is_no_difference() -> None:
    equal = np.array([[1 - 1 / 3, 2 / 3], [0.1 + 0.2, 0.3], [0.9, 0.9]])
    assert equal[0, 0] != equal[0, 1]
    assert not have_differences(equal).any()
    assert select_groups(equal, 3).tolist() == []
    assert have_differences(np.array([[0.5, 0.50001]])).all()


def test_every_group_is_counted_once() -> None:
    scores = np.array([[1, 1], [0, 0], [1, 0], [0.8, 0.8], [0.7, 0.7], [0.1, 0.2], [0.75, 0.75]])
    assert count_groups(scores, kept=1, pass_score=0.75) == {
        "groups/drawn": 7,
        "groups/all_right": 3,
        "groups/all_wrong": 2,
        "groups/kept": 1,
        "groups/valid_share": pytest.approx(2 / 7),
    }
