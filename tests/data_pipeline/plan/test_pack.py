"""Packing against its definition, and the properties of every packing."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.plan.pack import LONG_SHARE, pack

pytestmark = pytest.mark.fast


def best_fit_decreasing(sizes: list[int], capacity: int, packs: int) -> list[int]:
    """Return how much is in each pack, by definition; a piece that fits nowhere is skipped."""
    filled = [0] * packs
    for size in sorted(sizes, reverse=True):
        fitting = [number for number in range(packs) if filled[number] + size <= capacity]
        if fitting:
            filled[max(fitting, key=lambda number: filled[number])] += size
    return filled


def random_case(rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
    capacity = int(rng.integers(1, 60))
    return rng.integers(1, capacity + 1, rng.integers(1, 80)), capacity, int(rng.integers(1, 40))


def lognormal(rng: np.random.Generator, packs: int, fill: float) -> np.ndarray:
    """Return piece sizes distributed like real ones, in units of 8 tokens, which fill `packs` packs of 8,192 tokens."""
    sizes = (np.exp(rng.normal(7.3, 0.9, 8 * packs)).clip(16, 8160) / 8).astype(int)
    return sizes[: np.searchsorted(np.cumsum(sizes), fill * packs * 1024)]


def test_worked_example():
    assert pack(np.array([5, 4, 3, 3, 1]), capacity=8, packs=2).tolist() == [0, 1, 0, 1, 1]
    assert pack(np.array([8, 8, 8]), capacity=8, packs=2).tolist() == [0, 1, -1]
    assert pack(np.array([], dtype=int), capacity=8, packs=2).tolist() == []


def test_every_piece_gets_a_pack_with_space_or_none():
    rng = np.random.default_rng(1)
    for _ in range(1000):
        sizes, capacity, packs = random_case(rng)
        heavy, share = int(rng.integers(packs + 1)), float(rng.random())
        chosen = pack(sizes, capacity=capacity, packs=packs, heavy=heavy, spread_share=share)
        assert len(chosen) == len(sizes)
        assert set(chosen.tolist()) <= {-1, *range(packs)}
        filled = np.bincount(chosen[chosen >= 0], sizes[chosen >= 0], packs)
        assert filled.max() <= capacity
        # A piece without a pack does not fit in any pack.
        assert (sizes[chosen < 0] > capacity - filled.min()).all()


def test_packing_without_heavy_packs_is_best_fit_decreasing():
    rng = np.random.default_rng(2)
    for _ in range(500):
        sizes, capacity, packs = random_case(rng)
        chosen = pack(sizes, capacity=capacity, packs=packs, spread_share=0)
        filled = np.bincount(chosen[chosen >= 0], sizes[chosen >= 0], packs)
        expected = best_fit_decreasing(sizes.tolist(), capacity, packs)
        assert (chosen < 0).any() == (sum(expected) < sizes.sum())
        if min(expected):
            assert sorted(filled) == sorted(expected)
        else:
            assert np.count_nonzero(filled) == min(packs, len(sizes))


def test_packs_of_a_global_batch_are_nearly_full():
    """First fit fills 97% here."""
    sizes = lognormal(np.random.default_rng(3), 512, 0.998)
    assert (pack(sizes, capacity=1024, packs=512, spread_share=0) >= 0).all()
    sizes = lognormal(np.random.default_rng(3), 512, 0.9885)
    assert (pack(sizes, capacity=1020, packs=512, heavy=32) >= 0).all()


def test_long_pieces_are_in_the_heavy_packs_and_the_others_are_balanced():
    sizes = lognormal(np.random.default_rng(4), 512, 0.9885)
    chosen = pack(sizes, capacity=1020, packs=512, heavy=32)
    squares = np.bincount(chosen, sizes.astype(np.int64) ** 2, 512)
    assert squares[:32].min() > squares[32:].mean()
    plain = pack(sizes, capacity=1020, packs=512, spread_share=0)
    plain_squares = np.bincount(plain, sizes.astype(np.int64) ** 2, 512)
    assert np.ptp(np.percentile(squares[32:], [10, 90])) < 0.7 * np.ptp(np.percentile(plain_squares, [10, 90]))
    assert sizes[chosen < 32].max() == sizes.max() > 1020 * LONG_SHARE
