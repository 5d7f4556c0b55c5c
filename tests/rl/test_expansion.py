"""The expansion's moving average against its formula, and what it is for: as many valid groups in every iteration."""

from __future__ import annotations

import json
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import pytest

from benchmarks.curriculum import kept_groups
from model.errors import CheckpointError, ConfigError
from rl.expansion import Expansion, ExpansionConfig

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("seed", range(10))
def test_ratio_is_the_average_of_the_report_and_counts_are_rounded_up(seed: int) -> None:
    rng = np.random.default_rng(seed)
    expansion, expected = Expansion(ExpansionConfig()), Fraction(1)
    assert expansion.count(37) == 37
    for _ in range(50):
        groups = int(rng.integers(1, 64))
        not_valid = Fraction(int(rng.integers(0, groups + 1)), groups)
        ratio = min(1 / (1 - not_valid), Fraction(4)) if not_valid < 1 else Fraction(4)
        expected = Fraction(9, 10) * expected + Fraction(1, 10) * ratio
        expansion.observe(float(1 - not_valid))
        assert expansion.ratio == pytest.approx(float(expected), abs=1e-12)
        assert expansion.count(48) == ceil(48 * expected)


def test_iterations_without_any_valid_group_reach_the_largest_ratio_and_no_more() -> None:
    expansion = Expansion(ExpansionConfig(max_ratio=3.0))
    for _ in range(300):
        expansion.observe(0.0)
        assert expansion.ratio <= 3.0
    assert expansion.ratio == pytest.approx(3.0)
    assert expansion.count(100) == 300


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.7, 0.9, 0.99])
def test_all_groups_valid_is_no_expansion_at_all(decay: float) -> None:
    expansion = Expansion(ExpansionConfig(decay=decay))
    for _ in range(100):
        expansion.observe(1.0)
        assert expansion.count(100) == 100


def test_disabled_expansion_draws_what_is_trained_on() -> None:
    expansion = Expansion(ExpansionConfig(enabled=False))
    expansion.observe(0.1)
    assert expansion.count(128) == 128


def test_resumed_expansion_continues() -> None:
    expansion, other = Expansion(ExpansionConfig()), Expansion(ExpansionConfig())
    for share in (0.3, 0.7, 0.1):
        expansion.observe(share)
    other.load_state_dict(json.loads(json.dumps(expansion.state_dict())))
    assert other.ratio == expansion.ratio
    capped = Expansion(ExpansionConfig(max_ratio=1.25))
    capped.load_state_dict({"ratio": 2.0})
    assert capped.ratio == 1.25
    disabled = Expansion(ExpansionConfig(enabled=False))
    disabled.load_state_dict({"ratio": 2.0})
    assert disabled.ratio == 1.0


@pytest.mark.parametrize(
    "state", [{}, {"ratio": None}, {"ratio": "2"}, {"ratio": 0.5}, {"ratio": float("nan")}, {"ratio": float("inf")}]
)
def test_damaged_state_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="state of the expansion in the checkpoint is damaged"):
        Expansion(ExpansionConfig()).load_state_dict(state)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"decay": 1.0}, r"expansion\.decay=1\.0: give a number from 0 to below 1"),
        ({"max_ratio": 0.5}, r"expansion\.max_ratio=0\.5: give a number from 1"),
        ({"max_ratio": float("inf")}, r"expansion\.max_ratio=inf"),
    ],
)
def test_wrong_keys_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpansionConfig(**keys)


@pytest.mark.parametrize(("shape", "without"), [("curve", 0.3), ("step", 0.3), ("line", 0.25)])
def test_groups_trained_on_stay_even_while_the_valid_share_falls(shape: str, without: float) -> None:
    """From 0.8 to 0.3. A fall along a line has a deviation / mean of 0.26 by itself, whatever is drawn."""
    for seed in range(5):
        expanded, plain = (kept_groups(shape, expand=expand, seed=seed) for expand in (True, False))
        assert expanded.std() / expanded.mean() <= 0.15
        assert plain.std() / plain.mean() >= without
