"""Filters of pictures: too small or too large, too long, of one colour. One picture that fails drops its sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.filters import Drop, Filter
from data_pipeline.errors import DataError

SOLID_SAMPLES = 128  # a picture's colours are looked at on a grid of at most so many rows and columns


@dataclass
class Resolution(Filter):
    """`too_small`, `too_large`: the size of pictures and of the frames of clips."""

    min_side: int = 64
    max_pixels: int = 50_000_000

    def __call__(self, sample: Candidate) -> Drop | None:
        for height, width in _sizes(sample):
            if min(height, width) < self.min_side:
                return Drop("too_small", f"{width}x{height}: a side is shorter than {self.min_side}")
            if height * width > self.max_pixels:
                return Drop("too_large", f"{width}x{height}: more than {self.max_pixels} pixels")
        return None


@dataclass
class Aspect(Filter):
    """`extreme_aspect`: the longer side of a picture or clip against the shorter."""

    max: float = 8.0

    def __call__(self, sample: Candidate) -> Drop | None:
        for height, width in _sizes(sample):
            if max(height, width) > self.max * min(height, width):
                return Drop("extreme_aspect", f"{width}x{height}: one side is more than {self.max:g} times the other")
        return None


@dataclass
class SolidColour(Filter):
    """`solid_colour`: nearly all pixels have one colour. `low_contrast`: the grey levels hardly differ.

    A colour that more than half of the pixels share is their median, channel by channel, so that is the one compared.
    """

    max_share: float = 0.98  # of the pixels may have one colour
    tolerance: int = 8  # levels of 255 by which a channel of that colour may differ
    min_deviation: float = 3.0  # standard deviation of the grey levels, of 255

    def check(self) -> None:
        if not 0.5 <= self.max_share <= 1:
            raise DataError(f"solid_colour.max_share is {self.max_share}: give a share from 0.5 to 1")

    def __call__(self, sample: Candidate) -> Drop | None:
        for picture in sample.pictures:
            rows, columns = (max(side // SOLID_SAMPLES, 1) for side in picture.shape[:2])
            pixels = picture[::rows, ::columns].reshape(-1, 3).astype(np.int16)
            colour = np.median(pixels, axis=0)
            share = float((np.abs(pixels - colour).max(axis=1) <= self.tolerance).mean())
            if share > self.max_share:
                shown = "#" + "".join(f"{int(level):02x}" for level in colour)
                return Drop("solid_colour", f"{share:.1%} of the pixels are {shown}")
            deviation = float(pixels.mean(axis=1).std())
            if deviation < self.min_deviation:
                return Drop("low_contrast", f"grey levels deviate by {deviation:.2f} of 255")
        return None


def _sizes(sample: Candidate) -> list[tuple[int, int]]:
    return [*sample.sizes, *((clip.height, clip.width) for clip in sample.clips)]
