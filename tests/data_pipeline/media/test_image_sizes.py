"""Sizes of whole columns against the scalar function."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.errors import BadSample, DataError
from data_pipeline.media.image_sizes import grid_of, patches_of, resized_size, resized_sizes


def compare(cases: int, seed: int) -> None:
    """Compare on sides of 1 to 20,000 pixels, budgets that shrink all, some or none, videos of up to 600 frames."""
    rng = np.random.default_rng(seed)
    height = np.exp(rng.uniform(0, 9.9, cases)).astype(np.int32)
    width = np.clip(height * np.exp(rng.uniform(-5.6, 5.6, cases)), 1, 20_000).astype(np.int32)
    frames = 2 * rng.integers(1, 301, cases)
    for max_tokens, counts in ((6144, np.full(cases, 2)), (9, np.full(cases, 2)), (30_000, frames), (60, frames)):
        kept, expected = [], []
        for case in range(cases):
            try:
                size = resized_size.__wrapped__(
                    int(height[case]), int(width[case]), max_tokens=max_tokens, frames=int(counts[case])
                )
            except BadSample:
                continue
            kept.append(case)
            expected.append(size)
        assert cases * 0.8 < len(kept) < cases
        sizes = resized_sizes(height[kept], width[kept], max_tokens=max_tokens, frames=counts[kept])
        assert np.array_equal(np.stack(sizes, axis=1), expected)


@pytest.mark.fast
def test_worked_example_of_the_module():
    height, width = resized_sizes(np.array([480, 60]), np.array([640, 4000]), max_tokens=6144)
    assert (height.tolist(), width.tolist()) == ([476, 56], [644, 4004])
    grids = [grid_of(size) for size in ((476, 644), (56, 4004))]
    patches = patches_of(np.array([480, 60]), np.array([640, 4000]), max_tokens=6144)
    assert patches.tolist() == [h * w for h, w in grids]
    assert patches_of(np.array([]), np.array([]), max_tokens=6144).tolist() == []


@pytest.mark.fast
def test_resized_sizes_equals_the_scalar_function():
    compare(5_000, seed=0)


@pytest.mark.slow
def test_resized_sizes_equals_the_scalar_function_a_million_times():
    compare(1_000_000, seed=1)


@pytest.mark.fast
@pytest.mark.parametrize("size", [(0, 50), (50, -1), (20, 20_000)])
def test_resized_sizes_rejects_what_the_scalar_function_rejects(size):
    with pytest.raises(BadSample):
        resized_size(*size, max_tokens=6144)
    with pytest.raises(DataError):
        resized_sizes(np.array([100, size[0]]), np.array([100, size[1]]), max_tokens=6144)
