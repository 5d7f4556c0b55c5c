"""Drawing: uniform and independent numbers, the distribution of tokens, and no dependence on other rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from rl.engines.drawing import draw, uniforms
from rl.rollouts import seed_of

pytestmark = pytest.mark.fast


def seeds(count: int, run: int = 0) -> np.ndarray:
    return np.array([seed_of(run, 1, "a.tar/1", number) for number in range(count)], np.uint64)


@pytest.mark.parametrize("kind", ["seeds of a group", "positions of a response", "small seeds"])
def test_numbers_are_uniform_and_do_not_follow_from_their_neighbours(kind: str) -> None:
    count = 20_000
    own, positions = seeds(count), np.zeros(count, np.int64)
    if kind == "positions of a response":
        own, positions = np.repeat(seeds(1), count), np.arange(count)
    elif kind == "small seeds":
        own = np.arange(count, dtype=np.uint64)
    numbers = uniforms(own, positions)
    assert (numbers.min() >= 0, numbers.max() < 1) == (True, True)
    assert stats.kstest(numbers, "uniform").pvalue > 0.01
    pairs = np.histogram2d(numbers[:-1], numbers[1:], bins=10)[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 0.01


def test_number_is_that_of_its_pair_alone() -> None:
    numbers = uniforms(seeds(5), np.arange(5))
    for row in range(5):
        assert uniforms(seeds(5)[row : row + 1], np.array([row])) == numbers[row]
    # The published constants of SplitMix64: its first output for the state 0.
    assert math.isclose(
        float(uniforms(np.array([2**64 - 0x9E3779B97F4A7C15], np.uint64), np.zeros(1, np.int64))[0]),
        0xE220A8397B1DCDAF / 2**64,
    )


def test_token_is_the_first_whose_cumulative_probability_is_above_the_number() -> None:
    probabilities = np.array([0.0, 0.25, 0.5, 0.0, 0.25])
    with np.errstate(divide="ignore"):
        logits = torch.from_numpy(np.log(probabilities))
    cases = {0.0: 1, 0.2: 1, 0.25: 2, 0.5: 2, 0.74: 2, 0.75: 4, 1 - 2**-53: 4}
    tokens, log_probs = draw(logits.expand(len(cases), -1), 1.0, torch.tensor(list(cases), dtype=torch.float64))
    assert tokens.tolist() == list(cases.values())
    np.testing.assert_allclose(log_probs, np.log(probabilities[tokens]), rtol=1e-7)
    assert log_probs.dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_log_probabilities_are_those_of_the_distribution_that_is_drawn_from(temperature: float) -> None:
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(1)) * 2
    numbers = torch.from_numpy(uniforms(seeds(4000), np.zeros(4000, np.int64)))
    tokens, log_probs = draw(logits.expand(4000, -1), temperature, numbers)
    expected = torch.log_softmax(logits[0].double() / temperature, 0)
    np.testing.assert_allclose(log_probs, expected[tokens], atol=1e-6)
    counts = np.bincount(tokens, minlength=7)
    assert stats.chisquare(counts, 4000 * expected.exp().numpy()).pvalue > 0.01


def test_temperature_zero_takes_the_lowest_of_the_most_likely_tokens() -> None:
    tokens, log_probs = draw(torch.tensor([[0.0, 3.0, 3.0], [9.0, 1.0, 1.0]]), 0.0, torch.tensor([0.9, 0.9]).double())
    assert tokens.tolist() == [1, 0]
    np.testing.assert_allclose(log_probs[0].item(), -math.log(2 + math.exp(-3)), rtol=1e-6)
