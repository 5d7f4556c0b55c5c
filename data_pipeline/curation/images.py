"""Filters of images: too small or large, too long, of one colour. One bad image filters its sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.filters import Filter, Filtered
from data_pipeline.errors import DataError

SOLID_SAMPLES = 128  # the colours of an image are sampled on a grid of about this many rows and columns


@dataclass
class Resolution(Filter):
    """`too_small`, `too_large`: the size of images and of the frames of videos."""

    min_side: int = 64  # pixels
    max_pixels: int = 50_000_000

    def __call__(self, sample: Candidate) -> Filtered | None:
        """Return why the sample is filtered, or None."""
        for height, width in _sizes(sample):
            if min(height, width) < self.min_side:
                return Filtered("too_small", f"{width}x{height}: a side is shorter than {self.min_side}")
            if height * width > self.max_pixels:
                return Filtered("too_large", f"{width}x{height}: more than {self.max_pixels} pixels")
        return None


@dataclass
class Aspect(Filter):
    """`extreme_aspect`: the ratio of the longer to the shorter side of an image or video."""

    max: float = 8.0  # longer side divided by shorter side

    def __call__(self, sample: Candidate) -> Filtered | None:
        """Return why the sample is filtered, or None."""
        for height, width in _sizes(sample):
            if max(height, width) > self.max * min(height, width):
                detail = f"{width}x{height}: one side is more than {self.max:g} times the other"
                return Filtered("extreme_aspect", detail)
        return None


@dataclass
class SolidColour(Filter):
    """`solid_colour`: nearly all pixels have one colour. `low_contrast`: the grey levels hardly differ.

    A colour of more than half of the pixels is their median in each channel, so the median is the colour compared.
    """

    max_share: float = 0.98  # largest share of pixels with one colour
    tolerance: int = 8  # levels, of 255, by which each channel of that colour may differ
    min_deviation: float = 3.0  # least standard deviation of the grey levels, of 255

    def check(self) -> None:
        """Raise DataError for options that cannot work."""
        if not 0.5 <= self.max_share <= 1:
            raise DataError(f"solid_colour.max_share is {self.max_share}: give a share from 0.5 to 1")

    def __call__(self, sample: Candidate) -> Filtered | None:
        """Return why the sample is filtered, or None."""
        for image in sample.pixels:
            row_step, column_step = (max(side // SOLID_SAMPLES, 1) for side in image.shape[:2])
            pixels = image[::row_step, ::column_step].reshape(-1, 3).astype(np.int16)
            colour = np.median(pixels, axis=0)
            share = float((np.abs(pixels - colour).max(axis=1) <= self.tolerance).mean())
            if share > self.max_share:
                shown = "#" + "".join(f"{int(level):02x}" for level in colour)
                return Filtered("solid_colour", f"{share:.1%} of the pixels are {shown}")
            deviation = float(pixels.mean(axis=1).std())
            if deviation < self.min_deviation:
                return Filtered("low_contrast", f"grey levels deviate by {deviation:.2f} of 255")
        return None


def _sizes(sample: Candidate) -> list[tuple[int, int]]:
    return [*sample.sizes, *((info.height, info.width) for info in sample.video_infos)]
