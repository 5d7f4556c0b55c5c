"""Filters of what a sample is made of: pictures against words, and the boxes in its text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.filters import Drop, Filter
from data_pipeline.curation.texts import words_of

BOX_RANGE = (0, 999)  # coordinates are thousandths of width and height
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


@dataclass
class Albums(Filter):
    """`album`: many pictures and hardly a word, as galleries and pages of thumbnails have."""

    domains: list[str] = field(default_factory=lambda: ["interleaved"])
    min_pictures: int = 4  # documents with fewer are no albums
    min_words_per_picture: float = 5.0

    def __call__(self, sample: Candidate) -> Drop | None:
        words, pictures = len(words_of(sample.text)), len(sample.images)
        if pictures >= self.min_pictures and words < self.min_words_per_picture * pictures:
            return Drop("album", f"{words} words with {pictures} pictures")
        return None


@dataclass
class Boxes(Filter):
    """`too_few_boxes`: fewer than `min_boxes` boxes [x1,y1,x2,y2] lie inside 0..999 with x1 < x2 and y1 < y2."""

    domains: list[str] = field(default_factory=lambda: ["grounding"])
    min_boxes: int = 2

    def __call__(self, sample: Candidate) -> Drop | None:
        boxes = boxes_in(sample.text)
        valid = sum(map(is_valid_box, boxes))
        if valid < self.min_boxes:
            return Drop("too_few_boxes", f"{valid} of {len(boxes)} boxes are valid, {self.min_boxes} are needed")
        return None


def boxes_in(text: str) -> list[tuple[float, float, float, float]]:
    """Every [x1,y1,x2,y2] of a text, one of `[[1,2,3,4],[5,6,7,8]]` as well."""
    return [(float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in _BOX.findall(text)]


def is_valid_box(box: tuple[float, float, float, float]) -> bool:
    x1, y1, x2, y2 = box
    low, high = BOX_RANGE
    return low <= x1 < x2 <= high and low <= y1 < y2 <= high
