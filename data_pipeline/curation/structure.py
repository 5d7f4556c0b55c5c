"""Filters of what a sample is made of: pictures against words, and the boxes in its text."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.filters import Drop, Filter
from data_pipeline.curation.texts import words_of
from data_pipeline.media.boxes import is_valid_box, written_boxes


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
        boxes = [box for _, box in written_boxes(sample.text)]
        valid = sum(map(is_valid_box, boxes))
        if valid < self.min_boxes:
            return Drop("too_few_boxes", f"{valid} of {len(boxes)} boxes are valid, {self.min_boxes} are needed")
        return None
