"""Advantages against torch, and exactly 0 where there is nothing to learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl.advantages import ADVANTAGES, group_advantages
from rl.selection import select_groups

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("seed", range(10))
def test_advantages_are_those_of_torch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.random((20, int(rng.integers(2, 17))))
    rewards = torch.tensor(scores)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    expected = {"centred": centred, "grpo": centred / rewards.std(dim=1, correction=0, keepdim=True)}
    for kind in ADVANTAGES:
        found = group_advantages(scores, kind)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected[kind].numpy(), rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-12)


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 0.7, 0.9, 1.0])
def test_groups_without_differences_get_exactly_0(kind: str, reward: float) -> None:
    leaks = 0
    for size in range(2, 65):
        scores = np.full((1, size), reward)
        leaks += bool(np.any(scores - scores.mean(axis=1, keepdims=True)))
        advantages = group_advantages(scores, kind)
        assert advantages.tobytes() == np.zeros((1, size)).tobytes()
    assert leaks or reward in (0.0, 1.0)  # without the rule some of them would not be 0


def test_rounding_of_rewards_is_no_advantage() -> None:
    assert not group_advantages(np.array([[1 - 1 / 3, 2 / 3]]), "grpo").any()


def test_group_with_a_reward_that_is_not_a_number_gets_0() -> None:
    scores = np.array([[np.nan, 1.0], [0.0, 1.0]])
    assert group_advantages(scores, "grpo").tolist() == [[0, 0], [-1, 1]]
    assert select_groups(scores, 2).tolist() == [1]


def test_groups_do_not_see_each_other() -> None:
    scores = np.random.default_rng(0).random((6, 4))
    scores[2] = 0.9
    together = group_advantages(scores, "grpo")
    assert all(together[row].tobytes() == group_advantages(scores[[row]], "grpo").tobytes() for row in range(6))


@pytest.mark.parametrize("dtype", [np.float32, np.int64, bool])
def test_rewards_of_other_types_are_computed_in_float64(dtype: type) -> None:
    assert group_advantages(np.array([[1, 1, 0, 0]], dtype), "grpo").tolist() == [[1, 1, -1, -1]]


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="advantage 'gae': choose one of grpo, centred"):
        group_advantages(np.ones((1, 2)), "gae")
