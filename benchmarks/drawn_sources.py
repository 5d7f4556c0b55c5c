"""Sources of made-up samples in the form that the plan asks for: sizes of pictures and clips as real ones have, resized
as the data pipeline resizes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.media.images import grid_of, resized_size, tokens_of

IMAGE_MAX_TOKENS, VIDEO_MAX_TOKENS = 6144, 30000
SHARD_SAMPLES = 500

Grid = tuple[int, int]  # patches
Drawn = tuple[list[Grid], int]  # a sample's pictures and frame pairs, and its tokens of text


def photo(rng: np.random.Generator, megapixels: float, spread: float) -> Grid:
    """As pictures of the web come: lognormal around so many megapixels, few very large, 1:1 to 16:9."""
    area = min(megapixels * 1e6 * rng.lognormal(sigma=spread), 12e6)
    aspect = rng.choice([1, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3])
    return picture(int((area / aspect) ** 0.5), int((area * aspect) ** 0.5))


def page(rng: np.random.Generator) -> Grid:
    """A4, A4 across or letter, at 72 to 150 dots an inch."""
    height, width = ((11.69, 8.27), (8.27, 11.69), (11, 8.5))[rng.integers(3)]
    dots = rng.choice([72, 96, 120, 150])
    return picture(int(height * dots), int(width * dots))


def screenshot(rng: np.random.Generator) -> Grid:
    return picture(*((720, 1280), (768, 1366), (1080, 1920), (844, 390), (915, 412))[rng.integers(5)])


def picture(height: int, width: int) -> Grid:
    return grid_of(resized_size(height, width, max_tokens=IMAGE_MAX_TOKENS))


def frame_pairs(height: int, width: int, pairs: int) -> list[Grid]:
    return [grid_of(resized_size(height, width, max_tokens=VIDEO_MAX_TOKENS, frames=2 * pairs))] * pairs


@dataclass
class DrawnSource:
    """As many samples of one kind as wanted (data_pipeline.plan.blend.SourceTable)."""

    label: str
    images: list[list[Grid]]
    lengths: np.ndarray
    weight: float = 1.0
    epochs: float = 0.0
    patches: np.ndarray = field(init=False)
    patches_squared: np.ndarray = field(init=False)
    is_text: np.ndarray = field(init=False)
    shard_rows: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        patches = [[h * w for h, w in images] for images in self.images]
        self.patches = np.array([sum(of_one) for of_one in patches])
        self.patches_squared = np.array([sum(n * n for n in of_one) for of_one in patches])
        self.is_text = self.patches == 0
        self.shard_rows = np.append(np.arange(0, len(self.images), SHARD_SAMPLES), len(self.images))

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def draw(
        cls, label: str, draw: Callable[[], Drawn], count: int, *, weight: float = 1.0, longest: float = np.inf
    ) -> DrawnSource:
        """`count` samples of at most `longest` tokens."""
        images, lengths = list[list[Grid]](), list[int]()
        while len(lengths) < count:
            grids, text = draw()
            length = text + sum(tokens_of(grid) + 2 for grid in grids)
            if length <= longest:
                images.append(grids)
                lengths.append(length)
        return cls(label, images, np.array(lengths), weight)

    def blocks(self, row: int) -> Sequence[tuple[int, int]]:
        raise AssertionError("no sample is cut here")

    def domain_of(self, row: int) -> str:
        return self.label
