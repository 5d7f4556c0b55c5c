"""Pass rates and tiers against a recount, one prompt at a time, of every rollout there was."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from rl.curriculum.config import CurriculumConfig
from rl.curriculum.curriculum import Curriculum
from rl.curriculum.rates import count_passes
from rl.curriculum.tiers import centres_of, tiers_of
from tests.rl.curriculum.prompts import make_facts

pytestmark = pytest.mark.fast

GROUP = 8
Visits = list[list[tuple[int, int]]]  # per iteration (row, passes)


def random_visits(rng: np.random.Generator, prompts: int) -> Visits:
    iterations = [rng.choice(prompts, int(rng.integers(0, prompts + 1)), replace=False) for _ in range(6)]
    return [[(int(row), int(rng.integers(0, GROUP + 1))) for row in rows] for rows in iterations]


def faded(history: list[tuple[Fraction, Fraction]], fade: Fraction) -> tuple[Fraction, Fraction]:
    """Return passes and rollouts of a history, the newest last, where each entry counts `fade` times the next one."""
    factors = [fade**age for age in reversed(range(len(history)))]
    parts = list(zip(factors, history, strict=True))
    return sum((f * p for f, (p, _) in parts), Fraction()), sum((f * r for f, (_, r) in parts), Fraction())


@pytest.mark.parametrize("seed", range(20))
def test_rates_are_those_of_all_rollouts_counted_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, kind_count = 12, 3
    kinds = rng.integers(0, kind_count, count)
    kinds[:kind_count] = range(kind_count)
    rollouts = rng.choice([0, 4, 16], count)
    passes = rng.binomial(rollouts, 0.4)
    tiers = rng.integers(-1, 5, count)
    facts = make_facts(kinds, tiers=tiers, passes=passes.astype(float), rollouts=rollouts.astype(float))
    config = CurriculumConfig()
    visits = random_visits(rng, count)

    curriculum = Curriculum(config, facts, seed=0)
    for visit in visits:
        rows, passed = np.array([row for row, _ in visit], int), np.array([p for _, p in visit], int)
        curriculum.observe(rows, passed, np.full(len(rows), GROUP))

    one, half, kind_fade = Fraction(1), Fraction(1, 2), Fraction(4, 5)
    bounds = [Fraction(0), *map(Fraction, ("0.05", "0.3", "0.7", "0.95")), one]
    centres = [(low + high) / 2 for low, high in pairwise(bounds)]
    known = []
    for row in range(count):
        if rollouts[row]:
            known.append((Fraction(int(passes[row])), Fraction(int(rollouts[row]))))
        elif tiers[row] >= 0:
            known.append((4 * centres[tiers[row]], Fraction(4)))
        else:
            known.append((Fraction(), Fraction()))
    of_all = (sum(p for p, _ in known) + half) / (sum(r for _, r in known) + 1)
    for kind in range(kind_count):
        rows_of_kind = [row for row in range(count) if kinds[row] == kind]
        before = (sum(known[row][0] for row in rows_of_kind) + of_all) / (
            sum(known[row][1] for row in rows_of_kind) + 1
        )
        sums = [
            (
                Fraction(sum(p for row, p in visit if kinds[row] == kind)),
                Fraction(sum(GROUP for row, _ in visit if kinds[row] == kind)),
            )
            for visit in visits
        ]
        passed_of_kind, of_kind = faded(sums, kind_fade)
        kind_rate = (passed_of_kind + before) / (of_kind + 1)
        assert curriculum.kind_rates[kind] == pytest.approx(float(kind_rate), abs=1e-12)
        for row in rows_of_kind:
            own = [(Fraction(p), Fraction(GROUP)) for visit in visits for seen, p in visit if seen == row]
            passed_of_prompt, tried = faded([known[row], *own], half)
            rate = (passed_of_prompt + kind_rate) / (tried + 1)
            assert curriculum.rates[row] == pytest.approx(float(rate), abs=1e-12)


def test_example_of_the_docstring() -> None:
    curriculum = Curriculum(CurriculumConfig(), make_facts([0, 1]), seed=0)
    for passes in (2, 8):
        curriculum.observe(np.array([0]), np.array([passes]), np.array([8]))
    expected = (9 + curriculum.kind_rates[0]) / 13
    assert curriculum.rates.tolist() == [pytest.approx(expected), 0.5]


def test_rollouts_are_counted_and_not_groups() -> None:
    """After one group of eight the prior of one rollout moves the rate by less than a ninth."""
    curriculum = Curriculum(CurriculumConfig(), make_facts([0] * 100), seed=0)
    curriculum.observe(np.arange(2), np.array([0, 8]), np.array([8, 8]))
    assert curriculum.rates[0] < 1 / 9
    assert curriculum.rates[1] > 8 / 9


def test_prompt_that_is_there_twice_is_one_visit() -> None:
    facts = make_facts([0, 0, 1])
    twice, once = (Curriculum(CurriculumConfig(), facts, seed=0) for _ in range(2))
    for curriculum in (twice, once):
        curriculum.observe(np.array([1]), np.array([8]), np.array([8]))
    twice.observe(np.array([1, 1]), np.array([2, 4]), np.array([8, 8]))
    once.observe(np.array([1]), np.array([6]), np.array([16]))
    assert twice.rates.tolist() == once.rates.tolist()


def test_group_without_rewards_only_ages_the_kinds() -> None:
    facts = make_facts([0, 1])
    seen, other = (Curriculum(CurriculumConfig(), facts, seed=0) for _ in range(2))
    seen.observe(np.array([0, 1]), np.array([4, 0]), np.array([8, 0]))
    other.observe(np.array([0]), np.array([4]), np.array([8]))
    assert seen.state_dict() == other.state_dict()


def test_kind_without_new_rollouts_returns_to_what_was_known_before() -> None:
    facts = make_facts([0, 1], passes=np.array([3.0, 0.0]), rollouts=np.array([4.0, 0.0]))
    curriculum = Curriculum(CurriculumConfig(), facts, seed=0)
    before = curriculum.kind_rates[0]
    curriculum.observe(np.array([0]), np.array([0]), np.array([8]))
    distances = []
    for _ in range(60):
        distances.append(before - curriculum.kind_rates[0])
        curriculum.observe(np.array([1]), np.array([4]), np.array([8]))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.5
    assert abs(distances[-1]) < 1e-4


def test_tiers_begin_at_their_edges() -> None:
    edges = [0.05, 0.3, 0.7, 0.95]
    rates = np.array([0, 0.0499, 0.05, 0.2999, 0.3, 0.6999, 0.7, 0.9499, 0.95, 1])
    assert tiers_of(rates, edges).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    rng = np.random.default_rng(0)
    for _ in range(50):
        edges = np.sort(rng.random(rng.integers(1, 8))).tolist()
        rates = rng.random(100)
        assert tiers_of(rates, edges).tolist() == np.searchsorted(edges, rates, side="right").tolist()


def test_label_moves_a_prompt_to_its_tier_by_as_much_as_it_counts() -> None:
    facts = make_facts([0] * 5, tiers=np.arange(5))
    assert Curriculum(CurriculumConfig(), facts, seed=0).tiers.tolist() == [1, 1, 2, 3, 3]
    assert Curriculum(CurriculumConfig(label_rollouts=100), facts, seed=0).tiers.tolist() == [0, 1, 2, 3, 4]
    assert tiers_of(centres_of([0.05, 0.3, 0.7, 0.95]), [0.05, 0.3, 0.7, 0.95]).tolist() == [0, 1, 2, 3, 4]
    ignored = Curriculum(CurriculumConfig(label_rollouts=0), facts, seed=0)
    assert ignored.rates.tolist() == [0.5] * 5


def test_grade_comes_before_the_label() -> None:
    facts = make_facts([0], tiers=np.array([4]), passes=np.array([0.0]), rollouts=np.array([16.0]))
    assert Curriculum(CurriculumConfig(), facts, seed=0).tiers.tolist() == [0]


def test_pass_is_a_reward_of_at_least_the_pass_score() -> None:
    scores = np.array([[0, 0.7499, 0.75, 1], [0.75, 0.8, 0.9, 1.0]])
    assert count_passes(scores, 0.75).tolist() == [2, 4]
