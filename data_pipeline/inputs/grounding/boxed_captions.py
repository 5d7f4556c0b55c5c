"""Images with the boxes of objects in them: captions with phrase boxes, and phrases with boxes.

A caption keeps its words. The boxes follow the phrase that they belong to, in thousandths (see media/boxes.py):

    {"image": "cat.jpg", "caption": "The cat sleeps.", "box_format": "xyxy",
     "phrases": [{"start": 0, "end": 7, "boxes": [[65, 24, 346, 273]]}]}

    <image>The cat [[101,80,540,910]] sleeps.

A phrase may also be given as {"text": "The cat"}: the first occurrence in the caption that no earlier phrase uses.
Phrases without a caption become one line each. Records of public data sets are converted first: see layouts.py; COCO's
annotations are in coco.py.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Draft, Media, NotRead, Rejected, Unit
from data_pipeline.inputs.flow import escape_placeholders
from data_pipeline.inputs.grounding.coco import coco_units, count_coco, read_coco
from data_pipeline.inputs.grounding.found import Found
from data_pipeline.inputs.grounding.layouts import Annotation, Spans, find_annotation
from data_pipeline.inputs.grounding.sources import Source, source_of
from data_pipeline.inputs.records.annotations import (
    NAMES_CHECKED,
    AnnotatedImage,
    annotated_image,
    check_folder,
    find_size,
    read_image,
)
from data_pipeline.inputs.records.record_fields import Captions
from data_pipeline.media.boxes import BoxFormat, Thousandths, write_boxes

GivenFormat = Literal["layout", "xyxy", "xywh", "normalised", "thousandths"]

_PHRASE_KEYS = {"start", "end", "text", "boxes"}


@dataclass(frozen=True)
class Grounding:
    """Images with boxes: files of records, see sources.py, and COCO annotations. A unit is a range of them."""

    paths: tuple[str, ...]  # JSON lines and lists, COCO annotations, Parquet tables, tars, Flickr30k Entities
    images: str = ""  # folder that the paths of images are relative to; empty: the folder of the annotation file
    box_format: GivenFormat = "layout"  # of records that do not name one; layout: as their layout has it
    captions: Captions = "all"  # of COCO captions: which of an image's captions become samples
    spans: Spans = "ask"  # which phrases of GRIT are read, where a sample has both

    def units(self) -> Sequence[Unit]:
        """Return the units of all files."""
        units: list[Unit] = []
        for path in self.paths:
            source = source_of(path)
            if source is None:
                units += coco_units(path, self.images)
                continue
            found = source.units(path)
            if not source.has_images:  # to look into a tar is to read all of it
                check_folder(path, self.images, self._first_images(source, found[0]))
            units += found
        return units

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the lines, entries, rows or members; of COCO, the images and annotations."""
        source = source_of(unit.path)
        return count_coco(unit) if source is None else source.count(unit)

    def read(self, unit: Unit) -> Iterator[Draft | Rejected | NotRead]:
        """Yield one sample per image. Phrases and boxes that cannot be used are yielded as Rejected, one by one."""
        folder = Path(self.images) if self.images else Path(unit.path).parent
        source = source_of(unit.path)
        if source is None:
            yield from read_coco(
                unit, folder, self.captions, "xywh" if self.box_format == "layout" else self.box_format
            )
            return
        for found in source.read(unit):
            if not isinstance(found, Found):
                yield found
            elif isinstance(found.record, BadSample):
                yield Rejected(found.origin, found.record.reason, found.record.detail, found.items)
            else:
                yield from self._caption(found.origin, found.record, found.items, folder)

    def _first_images(self, source: Source, unit: Unit) -> list[Any]:
        """Return the paths of images that the first records of a unit name."""
        paths: list[Any] = []
        for found in islice(source.read(unit), NAMES_CHECKED):
            if isinstance(found, Found) and isinstance(found.record, dict):
                with suppress(BadSample):  # reading will reject it
                    paths += find_annotation(found.record, self.spans).images
        return paths

    def _caption(
        self, origin: str, record: dict[str, Any], items: Mapping[str, int], folder: Path
    ) -> Iterator[Draft | Rejected]:
        """Yield the sample of a record. Its boxes are counted as they are given: each is in the sample or rejected."""
        given = rejected = 0
        try:
            annotation = find_annotation(record, self.spans)
            given = sum(map(_boxes_of, annotation.phrases))
            box_format = self._format(record, annotation)
            image = _image(annotation, folder)
            written = Writing(annotation.caption)
            for number, phrase in enumerate(annotation.phrases):
                where = f"{origin} phrase {number}"
                try:
                    span = written.span(phrase)
                except BadSample as error:
                    rejected += _boxes_of(phrase)
                    yield Rejected(where, error.reason, error.detail, {"boxes": _boxes_of(phrase)})
                    continue
                boxes: list[Thousandths] = []
                yield from _convert_boxes(phrase.get("boxes"), box_format, image, boxes, where)
                rejected += _boxes_of(phrase) - len(boxes)
                if boxes:
                    written.add(span, boxes)
            if not written.has_boxes:
                raise BadSample("no_boxes", "no phrase has a valid box")
        except BadSample as error:
            items = {**items, "boxes": given - rejected}
            yield Rejected(origin, error.reason, error.detail, items, {"boxes": given})
            return
        yield Draft(
            {"domain": "grounding", "text": f"<image>{written.text()}"},
            [image.media],
            origin=origin,
            items={**items, "boxes": given - rejected},
            given={"boxes": given},
            not_read=_unread(record, annotation),
        )

    def _format(self, record: dict[str, Any], annotation: Annotation) -> BoxFormat:
        """Return the format of the boxes of a record. Raises BadSample, also where it is not known."""
        known = ", ".join(get_args(BoxFormat))
        of_file = annotation.box_format if self.box_format == "layout" else self.box_format
        box_format = record.get("box_format", of_file)
        if box_format is None:
            raise BadSample("bad_record", f"the format of its boxes is not known: --set box_format= one of {known}")
        if box_format not in get_args(BoxFormat):
            raise BadSample("bad_record", f'"box_format" is {box_format!r}: use {known}')
        if annotation.fixed and box_format != annotation.box_format:
            raise BadSample("bad_record", f"its boxes name x, y and their sides: remove box_format={box_format}")
        return box_format


class Writing:
    """A caption whose boxes are inserted behind its phrases, or lines of phrases."""

    def __init__(self, caption: str | None) -> None:
        self._caption = caption
        self._taken: set[tuple[int, int]] = set()
        self._insertions: list[tuple[int, str]] = []  # (position in the caption, the boxes to insert there)
        self._lines: list[str] = []

    @property
    def has_boxes(self) -> bool:
        """Return whether any box was added."""
        return bool(self._insertions or self._lines)

    def span(self, phrase: Any) -> Any:
        """Return what a phrase stands for: characters of the caption, or a line. Raises BadSample (bad_phrase)."""
        if self._caption is None:
            if not isinstance(text := phrase["text"], str) or not text.strip():
                raise BadSample("bad_phrase", "boxes without a text")
            return " ".join(text.split())
        span = _span(phrase, self._caption, self._taken)
        self._taken.add(span)
        return span

    def add(self, span: Any, boxes: list[Thousandths]) -> None:
        """Add the boxes of a phrase."""
        if self._caption is None:
            self._lines.append(f"{escape_placeholders(span)} {write_boxes(boxes)}")
        else:
            self._insertions.append((span[1], f" {write_boxes(boxes)}"))

    def text(self) -> str:
        """Return the text with all boxes."""
        return "\n".join(self._lines) if self._caption is None else _with_boxes(self._caption, self._insertions)


def _image(annotation: Annotation, folder: Path) -> AnnotatedImage:
    """Return the image of an annotation. Of several paths it may have, the first that exists."""
    paths = annotation.images
    if isinstance(paths[0], BadSample):
        raise paths[0]
    if isinstance(paths[0], Media):
        return annotated_image(paths[0], annotation.size)
    name = next((path for path in paths if isinstance(path, str) and os.path.isfile(folder / path)), paths[0])
    return read_image(name, folder, annotation.size)


def _unread(record: dict[str, Any], annotation: Annotation) -> Counter[str]:
    """Count what is in no sample: keys of a record and of its phrases, and what its layout does not read."""
    read = annotation.read | find_size(annotation.size)[1] | {"box_format"}
    unread = annotation.unread + Counter(f"key {key}" for key in record.keys() - read)
    for phrase in annotation.phrases:
        if isinstance(phrase, dict):
            unread.update(f"phrase key {key}" for key in phrase.keys() - _PHRASE_KEYS)
    return unread


def _with_boxes(caption: str, insertions: list[tuple[int, str]]) -> str:
    """Return a caption with text inserted at positions."""
    text, done = "", 0
    for end, written in sorted(insertions, key=lambda insertion: insertion[0]):
        text += escape_placeholders(caption[done:end]) + written
        done = end
    return text + escape_placeholders(caption[done:])


def _boxes_of(phrase: Any) -> int:
    """Return how many boxes a phrase gives."""
    return len(_list(phrase.get("boxes"))) if isinstance(phrase, dict) else 0


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _span(phrase: Any, caption: str, taken: set[tuple[int, int]]) -> tuple[int, int]:
    """Return the characters [start, end) of the caption that a phrase stands for."""
    if not isinstance(phrase, dict):
        raise BadSample("bad_phrase", "a phrase must be a JSON object")
    start, end, text = phrase.get("start"), phrase.get("end"), phrase.get("text")
    if isinstance(start, int) and isinstance(end, int):
        if not 0 <= start < end <= len(caption):
            raise BadSample("bad_phrase", f"{start} to {end} is not inside the caption of {len(caption)} characters")
        if isinstance(text, str) and text.split() != caption[start:end].split():
            raise BadSample(
                "bad_phrase",
                f"characters {start} to {end} are {caption[start:end][:80]!r}, not {text[:80]!r}: count characters, "
                'not bytes or words, or remove "start" and "end"',
            )
        return start, end
    if not isinstance(text, str) or not text:
        raise BadSample("bad_phrase", 'a phrase needs "start" and "end", or "text"')
    start = caption.find(text)
    while start >= 0 and any(start < other_end and other_start < start + len(text) for other_start, other_end in taken):
        start = caption.find(text, start + 1)
    if start < 0:
        raise BadSample("bad_phrase", f"{text[:80]!r} is not in the caption, or earlier phrases use all of it")
    return start, start + len(text)


def _convert_boxes(
    boxes: Any, box_format: BoxFormat, image: AnnotatedImage, into: list[Thousandths], origin: str
) -> Iterator[Rejected]:
    """Append the valid boxes of an annotation to `into`, and yield a Rejected for every other one."""
    if not isinstance(boxes, list):
        yield Rejected(origin, "bad_box", '"boxes" must be a list of boxes')
        return
    for number, values in enumerate(boxes):
        try:
            into.append(image.thousandths(image.read_box(values, box_format)))
        except BadSample as error:
            given = "" if box_format == "xyxy" else f"{str(values)[:80]} ({box_format}), in pixels "
            yield Rejected(f"{origin} box {number}", error.reason, given + error.detail, {"boxes": 1})
