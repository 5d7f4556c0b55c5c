"""Filters of a sample's parts: the number of images against words, and the boxes in its text."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.filters import Filter, Filtered
from data_pipeline.curation.texts import words_of
from data_pipeline.media.boxes import is_valid_box, written_boxes


@dataclass
class Albums(Filter):
    """`album`: many images and hardly a word, as in galleries and pages of thumbnails."""

    domains: list[str] = field(default_factory=lambda: ["interleaved"])
    min_images: int = 4  # samples with fewer images are not albums
    min_words_per_image: float = 5.0  # samples with more words are not albums

    def __call__(self, sample: Candidate) -> Filtered | None:
        """Return why the sample is filtered, or None."""
        words, images = len(words_of(sample.text)), len(sample.images)
        if images >= self.min_images and words < self.min_words_per_image * images:
            return Filtered("album", f"{words} words with {images} images")
        return None


@dataclass
class Boxes(Filter):
    """`too_few_boxes`: fewer than `min_boxes` boxes [x1,y1,x2,y2] are inside 0..999 with x1 < x2 and y1 < y2."""

    domains: list[str] = field(default_factory=lambda: ["grounding"])
    min_boxes: int = 2  # valid boxes

    def __call__(self, sample: Candidate) -> Filtered | None:
        """Return why the sample is filtered, or None."""
        boxes = [box for _, box in written_boxes(sample.text)]
        valid = sum(map(is_valid_box, boxes))
        if valid < self.min_boxes:
            return Filtered("too_few_boxes", f"{valid} of {len(boxes)} boxes are valid, {self.min_boxes} are needed")
        return None
