"""Sources of synthetic samples for the plan: realistic sizes of images and videos, resized as by the data pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.media.image_sizes import grid_of, resized_size, tokens_of

IMAGE_MAX_TOKENS, VIDEO_MAX_TOKENS = 6144, 30000
SHARD_SAMPLES = 500

Grid = tuple[int, int]  # height and width in patches
SampleSize = tuple[list[Grid], int]  # the images and frame pairs of a sample, and its text tokens


def photo(rng: np.random.Generator, megapixels: float, spread: float) -> Grid:
    """Return a size like those of images on the web.

    Args:
        rng: Chooses the size.
        megapixels: The median.
        spread: The standard deviation of the logarithm.
    """
    area = min(megapixels * 1e6 * rng.lognormal(sigma=spread), 12e6)
    aspect = rng.choice([1, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3])
    return image(int((area / aspect) ** 0.5), int((area * aspect) ** 0.5))


def page(rng: np.random.Generator) -> Grid:
    """Return a page: A4, A4 landscape or letter, at 72 to 150 dots per inch."""
    height, width = ((11.69, 8.27), (8.27, 11.69), (11, 8.5))[rng.integers(3)]
    dots = rng.choice([72, 96, 120, 150])
    return image(int(height * dots), int(width * dots))


def screenshot(rng: np.random.Generator) -> Grid:
    """Return a screenshot of a computer or a telephone."""
    return image(*((720, 1280), (768, 1366), (1080, 1920), (844, 390), (915, 412))[rng.integers(5)])


def image(height: int, width: int) -> Grid:
    """Return the grid of an image of height x width pixels."""
    return grid_of(resized_size(height, width, max_tokens=IMAGE_MAX_TOKENS))


def frame_pairs(height: int, width: int, pairs: int) -> list[Grid]:
    """Return the grids of a video of `pairs` frame pairs."""
    return [grid_of(resized_size(height, width, max_tokens=VIDEO_MAX_TOKENS, frames=2 * pairs))] * pairs


@dataclass
class SyntheticSource:
    """Samples of one kind (data_pipeline.plan.blend.SourceTable)."""

    label: str  # name of the source
    images: list[list[Grid]]  # images and frame pairs of every sample
    lengths: np.ndarray  # int [samples], tokens
    weight: float = 1.0  # share of the tokens of the mixture
    epochs: float = 0.0  # 0: endless
    patches: np.ndarray = field(init=False)  # int [samples]
    patches_squared: np.ndarray = field(init=False)  # int [samples]
    is_text: np.ndarray = field(init=False)  # bool [samples]
    shard_rows: np.ndarray = field(init=False)  # int [shards + 1]

    def __post_init__(self) -> None:
        patches = [[h * w for h, w in images] for images in self.images]
        self.patches = np.array([sum(of_one) for of_one in patches])
        self.patches_squared = np.array([sum(n * n for n in of_one) for of_one in patches])
        self.is_text = self.patches == 0
        self.shard_rows = np.append(np.arange(0, len(self.images), SHARD_SAMPLES), len(self.images))

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def generate(
        cls, label: str, make: Callable[[], SampleSize], count: int, *, weight: float = 1.0, longest: float = np.inf
    ) -> SyntheticSource:
        """Return a source of `count` samples of at most `longest` tokens, each from a call of `make`."""
        images, lengths = list[list[Grid]](), list[int]()
        while len(lengths) < count:
            grids, text = make()
            length = text + sum(tokens_of(grid) + 2 for grid in grids)
            if length <= longest:
                images.append(grids)
                lengths.append(length)
        return cls(label, images, np.array(lengths), weight)

    def blocks(self, row: int) -> Sequence[tuple[int, int]]:
        """Raise an error: samples fit a sequence or are too long."""
        raise AssertionError("no sample is cut here")

    def domain_of(self, row: int) -> str:
        """Return the label of the source."""
        return self.label
