"""Exchanges keep every piece and make packs alike; steps get their share of all packs."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.plan.balance import deal, exchange, totals

pytestmark = pytest.mark.fast

COUNT, CAPACITY = 64, 1000


def made_up(seed: int, pieces_a_pack: int = 12) -> dict[str, np.ndarray]:
    """Packs filled at random with pieces whose patches follow their sizes loosely."""
    rng = np.random.default_rng(seed)
    packs = np.repeat(np.arange(COUNT), pieces_a_pack)
    sizes = rng.integers(20, 2 * CAPACITY // pieces_a_pack - 40, len(packs))
    over = np.bincount(packs, sizes, COUNT) > CAPACITY
    sizes[over[packs]] //= 2
    patches = (sizes * rng.uniform(0, 4, len(packs))).astype(np.int64)
    return {"packs": packs, "sizes": sizes, "costs": 1000 * sizes + sizes**2 + 50 * patches, "patches": patches}


@pytest.mark.parametrize("heavy", [0, 8, COUNT])
def test_exchanges_keep_the_capacity_and_even_out_patches(heavy):
    for seed in range(20):
        case = made_up(seed)
        after = exchange(**case, count=COUNT, capacity=CAPACITY, heavy=heavy, random=np.random.default_rng(seed))
        # A pack gives a piece for a piece: as many in each as before, and none lost.
        assert np.bincount(after, minlength=COUNT).tolist() == np.bincount(case["packs"], minlength=COUNT).tolist()
        assert totals(after, case["sizes"], COUNT).max() <= CAPACITY
        before = totals(case["packs"], case["patches"], COUNT)
        assert totals(after, case["patches"], COUNT).std() < (0.6 if heavy == COUNT else 0.8) * before.std()


def test_exchanges_even_out_costs_of_all_but_the_heavy_packs():
    ratios = []
    for seed in range(20):
        case = made_up(seed, pieces_a_pack=24)
        after = exchange(**case, count=COUNT, capacity=CAPACITY, heavy=8, random=np.random.default_rng(seed))
        before = totals(case["packs"], case["costs"], COUNT)[8:]
        ratios.append(totals(after, case["costs"], COUNT)[8:].std() / before.std())
    assert max(ratios) < 0.8
    assert np.mean(ratios) < 0.6


def test_exchanges_are_the_same_every_time():
    case = made_up(3)
    once, twice = (
        exchange(**case, count=COUNT, capacity=CAPACITY, heavy=4, random=np.random.default_rng(1)) for _ in range(2)
    )
    assert once.tolist() == twice.tolist()


def test_empty_packs_and_few_pieces():
    none = np.empty(0, np.int64)
    assert exchange(none, sizes=none, costs=none, patches=none, count=3, capacity=8, heavy=0, random=rng()).size == 0
    one = np.array([2])
    moved = exchange(one, sizes=one, costs=one, patches=one, count=3, capacity=8, heavy=0, random=rng())
    assert moved.tolist() == [2]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_every_pack_is_dealt_once_and_steps_are_alike():
    costs = np.random.default_rng(5).integers(1000, 2000, 256)
    dealt = deal(costs, costs % 100, steps=8, random=rng())
    assert dealt.shape == (8, 32)
    assert sorted(dealt.ravel().tolist()) == list(range(256))
    sums = costs[dealt].sum(axis=1)
    assert sums.max() / sums.min() < 1.01
    assert dealt.tolist() != deal(costs, costs % 100, steps=8, random=np.random.default_rng(1)).tolist()


def test_neighbours_in_a_step_cost_alike_and_among_equals_have_alike_patches():
    """Ten costs far apart, 16 packs of each: the order is by cost, then by patches, rising or falling."""
    random = np.random.default_rng(6)
    costs, patches = random.permuted(np.repeat(np.arange(10) * 1000 + 10_000, 16)), random.integers(0, 1000, 160)
    (step,) = deal(costs, patches, steps=1, random=rng())
    assert costs[step].tolist() == sorted(costs, reverse=True)
    for block, expected in zip(patches[step].reshape(10, 16).tolist(), [True, False] * 5, strict=True):
        assert block == sorted(block, reverse=expected)
