"""Synthetic sources: the plan can be checked over many epochs without reading files."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from data_pipeline.plan.pack_cost import PackCost

COST = PackCost(token=100, token_squared=1, patch=20, patch_squared=0)


@dataclass
class Table:
    """A `data_pipeline.plan.blend.SourceTable`."""

    label: str
    lengths: np.ndarray
    weight: float = 1.0
    epochs: float = 0.0
    domain: str = "image_text"
    images: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # (start, length) of the blocks, by row
    shard_size: int = 10

    def __post_init__(self) -> None:
        self.lengths = np.asarray(self.lengths, np.int32)  # as data_pipeline.loading.source.Source has them
        self.is_text = np.full(len(self.lengths), self.domain == "text")
        self.patches = np.array([4 * sum(size for _, size in self.blocks(row)) for row in range(len(self.lengths))])
        self.patches_squared = self.patches**2
        self.shard_rows = np.append(np.arange(0, len(self.lengths), self.shard_size), len(self.lengths))

    def blocks(self, row: int) -> list[tuple[int, int]]:
        return self.images.get(row, [])

    def domain_of(self, row: int) -> str:
        return self.domain


def table(label: str, weight: float, samples: int, *, low: int = 5, high: int = 200, **others) -> Table:
    """Make samples of low to high tokens, each with one image of up to half of them."""
    rng = np.random.default_rng(len(label) + samples)
    lengths = rng.integers(low, high, samples)
    images = {row: [(2, int(rng.integers(1, length // 2)))] for row, length in enumerate(lengths) if length >= 10}
    return Table(label, lengths, weight, images=images, **others)
