"""First-fit against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.pack import pack_first_fit

pytestmark = pytest.mark.fast


def by_definition(sizes: list[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    for item, size in enumerate(sizes):
        for pack in packs:
            if sum(sizes[other] for other in pack) + size <= capacity:
                pack.append(item)
                break
        else:
            packs.append([item])
    return packs


def test_worked_example():
    assert pack_first_fit([5, 4, 3, 3, 1], capacity=8) == [[0, 2], [1, 3, 4]]
    assert pack_first_fit([], capacity=8) == []
    assert pack_first_fit([8], capacity=8) == [[0]]


def test_equals_the_definition_on_random_input():
    rng = np.random.default_rng(9)
    for _ in range(500):
        capacity = int(rng.integers(1, 60))
        sizes = rng.integers(1, capacity + 1, rng.integers(0, 60)).tolist()
        assert pack_first_fit(sizes, capacity) == by_definition(sizes, capacity)


def test_fills_well():
    """Lengths spread like those of real samples fill more than 97% of 8,192 tokens in a window of 512 packs."""
    rng = np.random.default_rng(10)
    sizes = np.exp(rng.normal(7.3, 0.9, 2000)).clip(16, 8192).astype(int).tolist()
    packs = pack_first_fit(sizes, 8192)
    assert sum(sizes) / (8192 * len(packs)) > 0.97


def test_too_large():
    with pytest.raises(ValueError, match="item 1 of size 9 cannot fit a pack of 8"):
        pack_first_fit([1, 9], 8)
