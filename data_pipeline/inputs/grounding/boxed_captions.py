"""Images with the boxes of objects in them: captions with phrase boxes.

A caption keeps its words. The boxes follow the phrase that they belong to, in thousandths (see media/boxes.py):

    {"image": "cat.jpg", "caption": "The cat sleeps.", "box_format": "xyxy",
     "phrases": [{"start": 0, "end": 7, "boxes": [[65, 24, 346, 273]]}]}

    <image>The cat [[101,80,540,910]] sleeps.

A phrase may also be given as {"text": "The cat"}: the first occurrence in the caption that no earlier phrase uses.
COCO's annotations are in coco.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Draft, NotRead, Rejected, Unit
from data_pipeline.inputs.flow import escape_placeholders
from data_pipeline.inputs.grounding.coco import Captions, coco_units, count_coco, read_coco
from data_pipeline.inputs.records.annotations import IMAGE_BYTES, AnnotatedImage, line_units, read_image, read_objects
from data_pipeline.inputs.records.jsonl import count_records
from data_pipeline.media.boxes import BoxFormat, Thousandths, write_boxes

_KEYS = {
    "key": {"image", "caption", "phrases", "box_format", "width", "height"},
    "phrase key": {"start", "end", "text", "boxes"},
}


@dataclass(frozen=True)
class Grounding:
    """Captions with phrase boxes in JSON lines, and COCO annotations. A unit is a range of lines or of images."""

    paths: tuple[str, ...]  # files that end in .json are COCO annotations, all others JSON lines
    images: str = ""  # folder that the paths of images are relative to; empty: the folder of the annotation file
    box_format: BoxFormat = "xyxy"  # of JSON lines that do not name one
    captions: Captions = "all"  # of COCO captions: which of an image's captions become samples

    def units(self) -> Sequence[Unit]:
        """Return the units of all files."""
        units: list[Unit] = []
        for path in self.paths:
            if path.endswith(".json"):
                units += coco_units(path, self.images)
            else:
                units += line_units(path, bytes_per_line=IMAGE_BYTES)
        return units

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the lines; of COCO, the images and annotations."""
        return count_coco(unit) if unit.path.endswith(".json") else {"records": count_records(unit)}

    def read(self, unit: Unit) -> Iterator[Draft | Rejected | NotRead]:
        """Yield one sample per image. Phrases and boxes that cannot be used are yielded as Rejected, one by one."""
        folder = Path(self.images) if self.images else Path(unit.path).parent
        if unit.path.endswith(".json"):
            yield from read_coco(unit, folder, self.captions)
            return
        for origin, found in read_objects(unit):
            if isinstance(found, BadSample):
                yield Rejected(origin, found.reason, found.detail, {"records": 1})
            else:
                yield from self._caption(origin, found, folder)

    def _caption(self, origin: str, record: dict[str, Any], folder: Path) -> Iterator[Draft | Rejected]:
        """Yield the sample of a line. Its boxes are counted as they are given: each is in the sample or rejected."""
        given = sum(map(_boxes_of, _list(record.get("phrases"))))
        rejected = 0
        try:
            caption, phrases, box_format = self._checked(record)
            image = read_image(record.get("image"), folder, record)
            insertions: list[tuple[int, str]] = []  # (position in the caption, the boxes to insert there)
            taken: set[tuple[int, int]] = set()
            for number, phrase in enumerate(phrases):
                where = f"{origin} phrase {number}"
                try:
                    span = _span(phrase, caption, taken)
                except BadSample as error:
                    rejected += _boxes_of(phrase)
                    yield Rejected(where, error.reason, error.detail, {"boxes": _boxes_of(phrase)})
                    continue
                taken.add(span)
                boxes: list[Thousandths] = []
                yield from _convert_boxes(phrase.get("boxes"), box_format, image, boxes, where)
                rejected += _boxes_of(phrase) - len(boxes)
                if boxes:
                    insertions.append((span[1], f" {write_boxes(boxes)}"))
            if not insertions:
                raise BadSample("no_boxes", "no phrase of the caption has a valid box")
        except BadSample as error:
            items = {"records": 1, "boxes": given - rejected}
            yield Rejected(origin, error.reason, error.detail, items, {"boxes": given})
            return
        text = f"<image>{_with_boxes(caption, insertions)}"
        yield Draft(
            {"domain": "grounding", "text": text},
            [image.media],
            origin=origin,
            items={"records": 1, "boxes": given - rejected},
            given={"boxes": given},
            not_read=_unread_keys(record, phrases),
        )

    def _checked(self, record: dict[str, Any]) -> tuple[str, list[Any], BoxFormat]:
        """Return the caption, the phrases and the format of the boxes of a line. Raises BadSample."""
        caption, phrases = record.get("caption"), record.get("phrases")
        if not isinstance(caption, str) or not caption or not isinstance(phrases, list):
            raise BadSample("bad_record", 'a line needs a "caption" and a list of "phrases"')
        box_format = record.get("box_format", self.box_format)
        if box_format not in get_args(BoxFormat):
            raise BadSample("bad_record", f'"box_format" is {box_format!r}: use {", ".join(get_args(BoxFormat))}')
        return caption, phrases, box_format


def _with_boxes(caption: str, insertions: list[tuple[int, str]]) -> str:
    """Return a caption with text inserted at positions."""
    text, done = "", 0
    for end, written in sorted(insertions, key=lambda insertion: insertion[0]):
        text += escape_placeholders(caption[done:end]) + written
        done = end
    return text + escape_placeholders(caption[done:])


def _unread_keys(record: dict[str, Any], phrases: list[Any]) -> Counter[str]:
    unread = Counter(f"key {key}" for key in record.keys() - _KEYS["key"])
    for phrase in phrases:
        if isinstance(phrase, dict):
            unread.update(f"phrase key {key}" for key in phrase.keys() - _KEYS["phrase key"])
    return unread


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
