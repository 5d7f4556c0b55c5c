"""Exchanges keep every piece and balance the packs; every step gets its share of all packs."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.plan.balance import arrange_steps, exchange_pieces, sum_per_pack

pytestmark = pytest.mark.fast

COUNT, CAPACITY = 64, 1000


def random_packs(seed: int, pieces_per_pack: int = 12) -> dict[str, np.ndarray]:
    """Fill packs at random with pieces whose patches follow their sizes loosely."""
    rng = np.random.default_rng(seed)
    packs = np.repeat(np.arange(COUNT), pieces_per_pack)
    sizes = rng.integers(20, 2 * CAPACITY // pieces_per_pack - 40, len(packs))
    too_full = np.bincount(packs, sizes, COUNT) > CAPACITY
    sizes[too_full[packs]] //= 2
    patches = (sizes * rng.uniform(0, 4, len(packs))).astype(np.int64)
    return {"packs": packs, "sizes": sizes, "costs": 1000 * sizes + sizes**2 + 50 * patches, "patches": patches}


def exchanged(case: dict[str, np.ndarray], *, heavy: int, seed: int) -> np.ndarray:
    return exchange_pieces(**case, count=COUNT, capacity=CAPACITY, heavy=heavy, rng=np.random.default_rng(seed))


@pytest.mark.parametrize("heavy", [0, 8, COUNT])
def test_exchanges_keep_the_capacity_and_balance_patches(heavy):
    for seed in range(20):
        case = random_packs(seed)
        after = exchanged(case, heavy=heavy, seed=seed)
        # A pack gives one piece and gets one: the number of pieces in each pack stays the same.
        assert np.bincount(after, minlength=COUNT).tolist() == np.bincount(case["packs"], minlength=COUNT).tolist()
        assert sum_per_pack(after, case["sizes"], COUNT).max() <= CAPACITY
        before = sum_per_pack(case["packs"], case["patches"], COUNT)
        assert sum_per_pack(after, case["patches"], COUNT).std() < (0.6 if heavy == COUNT else 0.8) * before.std()


def test_exchanges_balance_the_costs_of_all_packs_except_the_heavy_ones():
    ratios = []
    for seed in range(20):
        case = random_packs(seed, pieces_per_pack=24)
        after = exchanged(case, heavy=8, seed=seed)
        before = sum_per_pack(case["packs"], case["costs"], COUNT)[8:]
        ratios.append(sum_per_pack(after, case["costs"], COUNT)[8:].std() / before.std())
    assert max(ratios) < 0.8
    assert np.mean(ratios) < 0.6


def test_exchanges_are_deterministic():
    case = random_packs(3)
    assert exchanged(case, heavy=4, seed=1).tolist() == exchanged(case, heavy=4, seed=1).tolist()


def test_exchanges_accept_empty_packs_and_few_pieces():
    def exchanged_in_three_packs(packs: np.ndarray) -> np.ndarray:
        return exchange_pieces(
            packs, sizes=packs, costs=packs, patches=packs, count=3, capacity=8, heavy=0, rng=np.random.default_rng(0)
        )

    assert exchanged_in_three_packs(np.empty(0, np.int64)).size == 0
    assert exchanged_in_three_packs(np.array([2])).tolist() == [2]


def test_every_pack_is_in_one_step_and_steps_cost_about_the_same():
    costs = np.random.default_rng(5).integers(1000, 2000, 256)
    steps = arrange_steps(costs, costs % 100, steps=8, rng=np.random.default_rng(0))
    assert steps.shape == (8, 32)
    assert sorted(steps.ravel().tolist()) == list(range(256))
    sums = costs[steps].sum(axis=1)
    assert sums.max() / sums.min() < 1.01
    assert steps.tolist() != arrange_steps(costs, costs % 100, steps=8, rng=np.random.default_rng(1)).tolist()


def test_neighbours_in_a_step_have_similar_costs_and_then_similar_patches():
    """Ten costs far apart, 16 packs of each: the order is by cost, then by patches, alternately falling and rising."""
    rng = np.random.default_rng(6)
    costs, patches = rng.permuted(np.repeat(np.arange(10) * 1000 + 10_000, 16)), rng.integers(0, 1000, 160)
    (step,) = arrange_steps(costs, patches, steps=1, rng=np.random.default_rng(0))
    assert costs[step].tolist() == sorted(costs, reverse=True)
    for block, expected in zip(patches[step].reshape(10, 16).tolist(), [True, False] * 5, strict=True):
        assert block == sorted(block, reverse=expected)
