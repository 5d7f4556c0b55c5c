"""The draw against probabilities that are computed by enumeration, and what holds for every draw."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from rl.curriculum.config import CurriculumConfig
from rl.curriculum.curriculum import Curriculum
from rl.curriculum.draw import draw_prompts, draw_weighted, split
from tests.rl.curriculum.prompts import make_facts

pytestmark = pytest.mark.fast


def rng_of(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(seed)))


def probability(order: tuple[int, ...], weights: list[float]) -> float:
    """Return the probability of drawing in this order, one after another without replacement."""
    result, left = 1.0, sum(weights)
    for item in order:
        result *= weights[item] / left
        left -= weights[item]
    return result


@pytest.mark.parametrize(("weights", "count"), [([0.05, 0.7, 1.0, 0.7], 3), ([1.0, 1.0, 5.0], 2), ([0.2, 3.0], 1)])
def test_orders_are_as_probable_as_enumeration_says(weights: list[float], count: int) -> None:
    trials = 20_000
    rng = rng_of(1)
    found = Counter(tuple(draw_weighted(np.array(weights), count, rng).tolist()) for _ in range(trials))
    orders = list(permutations(range(len(weights)), count))
    expected = np.array([probability(order, weights) for order in orders])
    assert expected.sum() == pytest.approx(1)
    assert set(found) <= set(orders)
    seen = np.array([found[order] for order in orders]) / trials
    deviation = np.sqrt(expected * (1 - expected) / trials)
    assert np.all(np.abs(seen - expected) < 4.5 * deviation + 1e-9)


def water_level(count: int, shares: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the number of each source, by bisection: min(size, level * share) with a sum of `count`."""
    low, high = 0.0, 1e12
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(sizes, level * shares).sum() < count else (low, level)
    return np.minimum(sizes, high * shares)


@pytest.mark.parametrize("seed", range(200))
def test_sources_give_their_shares_rounded_up_or_down(seed: int) -> None:
    rng = rng_of(2, seed)
    sources = int(rng.integers(1, 8))
    sizes = rng.integers(0, 50, sources)
    sizes[rng.integers(sources)] += 1
    shares = rng.choice([0.01, 1.0, 1.0, 2.5, 100.0], sources)
    count = int(rng.integers(0, sizes.sum() + 1))
    numbers = split(count, shares, sizes, rng)
    assert numbers.sum() == count
    assert np.all((numbers >= 0) & (numbers <= sizes))
    assert np.all(np.abs(numbers - water_level(count, shares, sizes)) < 1 + 1e-6)


def test_sources_give_exactly_their_shares_in_the_mean() -> None:
    shares, sizes, rng = np.array([0.01, 2.0, 1.0, 0.5]), np.array([10, 100, 4, 100]), rng_of(3)
    numbers = np.mean([split(13, shares, sizes, rng) for _ in range(20_000)], axis=0)
    assert numbers == pytest.approx(water_level(13, shares, sizes), abs=0.015)
    assert numbers[0] > 0.01  # a small source is drawn, too


@pytest.mark.parametrize("seed", range(60))
def test_no_prompt_is_drawn_twice_while_there_are_enough(seed: int) -> None:
    rng = rng_of(4, seed)
    prompts, sources = int(rng.integers(1, 60)), int(rng.integers(1, 5))
    of_prompts = rng.integers(0, sources, prompts)
    rows_of_sources = [np.flatnonzero(of_prompts == source) for source in range(sources)]
    weights = rng.choice([1e-6, 0.05, 0.7, 1.0], prompts)
    count = int(rng.integers(0, 4 * prompts))
    rows = draw_prompts(weights, rows_of_sources, np.ones(sources), count, rng)
    times = np.bincount(rows, minlength=prompts)
    assert len(rows) == count
    assert rows.dtype == np.int64
    assert set(times) <= {count // prompts, -(-count // prompts)}


def test_all_prompts_of_a_source_are_drawn_where_its_share_is_more() -> None:
    facts = make_facts([0] * 40 + [1] * 200, [0, 1], source_weights=[3.0, 1.0])
    rows = Curriculum(CurriculumConfig(), facts, seed=0).draw(0, 128)
    assert np.bincount(facts.sources[rows]).tolist() == [40, 88]


def test_share_of_a_source_depends_neither_on_its_size_nor_on_its_difficulty() -> None:
    kinds = [0] * 200 + [1] * 1000 + [2] * 1000
    facts = make_facts(kinds, [0, 0, 1], source_weights=[1.0, 3.0])
    curriculum = Curriculum(CurriculumConfig(), facts, seed=0)
    curriculum.observe(np.arange(1200, 2200), np.zeros(1000), np.full(1000, 8))  # all of the second source is hard
    for iteration in range(5):
        rows = curriculum.draw(iteration, 100)
        assert np.bincount(facts.sources[rows]).tolist() == [25, 75]


def test_tiers_and_kinds_are_drawn_by_their_weights() -> None:
    """A prompt's probability is its tier's weight times its kind's, over those of all prompts."""
    count, groups = 6000, 8
    kinds = np.repeat([0, 1], count // 2)
    facts = make_facts(kinds)
    curriculum = Curriculum(CurriculumConfig(), facts, seed=3)
    passes = np.resize([0, 0, 1, 2, 4, 6, 8, 8], count)
    curriculum.observe(np.arange(count), passes, np.full(count, groups))
    curriculum.observe(np.arange(count), passes, np.full(count, groups))
    rates = [(1.5 * passed + curriculum.kind_rates[kind]) / 13 for passed, kind in zip(passes, kinds, strict=True)]
    of_tier = [next(i for i, edge in enumerate([0.05, 0.3, 0.7, 0.95, 2]) if rate < edge) for rate in rates]
    of_kind = [max(0.25, 4 * rate * (1 - rate)) for rate in curriculum.kind_rates]
    weights = np.array([[0.05, 0.7, 1, 0.7, 0.05][t] * of_kind[k] for t, k in zip(of_tier, kinds, strict=True)])
    expected = np.bincount(of_tier, weights) / weights.sum()
    assert set(of_tier) == {0, 1, 2, 3, 4}
    rows = np.concatenate([curriculum.draw(i, 60) for i in range(400)])
    assert np.bincount(np.array(of_tier)[rows], minlength=5) / len(rows) == pytest.approx(expected, abs=0.01)
    report = curriculum.report()
    assert [report[f"curriculum/weight/tier_{tier}"] for tier in range(5)] == pytest.approx(expected)


def test_kinds_at_the_ends_are_drawn_less() -> None:
    facts = make_facts(np.repeat([0, 1, 2], 1000))
    curriculum = Curriculum(CurriculumConfig(edges=[0.5], weights=[1.0, 1.0]), facts, seed=3)
    rows = np.arange(0, 3000, 10)
    curriculum.observe(rows, np.repeat([0, 4, 8], 100), np.full(300, 8))
    low, middle, high = np.mean([np.bincount(facts.kinds[curriculum.draw(i, 300)]) for i in range(40)], axis=0)
    assert low / middle == pytest.approx(0.25, abs=0.04)
    assert high / middle == pytest.approx(0.25, abs=0.04)


def test_uniform_sampler_does_not_look_at_difficulty() -> None:
    facts = make_facts([0] * 1000)
    plain, taught = (Curriculum(CurriculumConfig(sampler="uniform"), facts, seed=5) for _ in range(2))
    taught.observe(np.arange(500), np.zeros(500), np.full(500, 8))
    assert taught.tiers.tolist() != plain.tiers.tolist()
    assert taught.draw(7, 64).tolist() == plain.draw(7, 64).tolist()
    times = np.bincount(np.concatenate([plain.draw(i, 500) for i in range(400)]), minlength=1000)
    assert abs(times - 200).max() < 5 * (400 * 0.25) ** 0.5


def test_draw_is_a_function_of_seed_iteration_and_state() -> None:
    facts = make_facts([0] * 500)
    curriculum = Curriculum(CurriculumConfig(), facts, seed=1)
    other_seed = Curriculum(CurriculumConfig(), facts, seed=2)
    state = curriculum.state_dict()
    third, first = curriculum.draw(3, 32).tolist(), curriculum.draw(1, 32).tolist()
    assert curriculum.state_dict() == state
    assert curriculum.draw(1, 32).tolist() == first
    assert curriculum.draw(3, 32).tolist() == third
    assert first != third
    assert other_seed.draw(1, 32).tolist() != first
    curriculum.observe(np.array(first), np.resize([0, 8], 32), np.full(32, 8))
    assert curriculum.draw(3, 32).tolist() != third


def test_draw_is_the_same_on_every_machine() -> None:
    """Resumed runs depend on it, across versions of numpy too."""
    curriculum = Curriculum(CurriculumConfig(), make_facts([0, 1] * 50, [0, 1]), seed=11)
    curriculum.observe(np.arange(50), np.resize([0, 3, 8], 50), np.full(50, 8))
    assert curriculum.draw(4, 8).tolist() == [52, 91, 19, 22, 4, 85, 87, 74]
