"""Images with the boxes of objects in them: captions with phrase boxes, and COCO instances.

A caption keeps its words. The boxes follow the phrase that they belong to, in thousandths (see media/boxes.py):

    {"image": "cat.jpg", "caption": "The cat sleeps.", "box_format": "xyxy",
     "phrases": [{"start": 0, "end": 7, "boxes": [[65, 24, 346, 273]]}]}

    <image>The cat [[101,80,540,910]] sleeps.

A phrase may also be given as {"text": "The cat"}: the first occurrence in the caption that no earlier phrase uses.
COCO instances (annotations with `bbox` and `category_id`) become one line per category:

    <image>dog [[101,80,540,910],[700,12,803,77]]
    cat [[5,100,52,180]]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Rejected, Unit
from data_pipeline.inputs.flow import escape_placeholders
from data_pipeline.inputs.records.annotations import (
    IMAGE_BYTES,
    LINES_PER_UNIT,
    AnnotatedImage,
    line_units,
    load_json,
    read_image,
    read_objects,
)
from data_pipeline.media.boxes import BoxFormat, Thousandths, read_box, to_thousandths, write_boxes


@dataclass(frozen=True)
class Grounding:
    """Captions with phrase boxes in JSON lines, and COCO instances. A unit is a range of lines, or of COCO's images."""

    paths: tuple[str, ...]  # files that end in .json are COCO instances, all others JSON lines
    images: str = ""  # folder that the paths of images are relative to; empty: the folder of the annotation file
    box_format: BoxFormat = "xyxy"  # of JSON lines that do not name one

    def units(self) -> Sequence[Unit]:
        """Return the units of all files."""
        _coco.cache_clear()  # the file may have changed
        units: list[Unit] = []
        for path in self.paths:
            units += _coco_units(path) if path.endswith(".json") else line_units(path, bytes_per_line=IMAGE_BYTES)
        return units

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        """Yield one sample per image. Phrases and boxes that cannot be used are yielded as Rejected, one by one."""
        folder = Path(self.images) if self.images else Path(unit.path).parent
        if unit.path.endswith(".json"):
            yield from _read_coco(unit, folder)
            return
        for origin, found in read_objects(unit):
            try:
                if isinstance(found, BadSample):
                    raise found
                yield from self._caption(origin, found, folder)
            except BadSample as error:
                yield Rejected(origin, error.reason, error.detail)

    def _caption(self, origin: str, record: dict[str, Any], folder: Path) -> Iterator[Draft | Rejected]:
        caption, phrases = record.get("caption"), record.get("phrases")
        if not isinstance(caption, str) or not caption or not isinstance(phrases, list):
            raise BadSample("bad_record", 'a line needs a "caption" and a list of "phrases"')
        box_format = record.get("box_format", self.box_format)
        if box_format not in get_args(BoxFormat):
            raise BadSample("bad_record", f'"box_format" is {box_format!r}: use {", ".join(get_args(BoxFormat))}')
        image = read_image(record.get("image"), folder)

        insertions: list[tuple[int, str]] = []  # (position in the caption, the boxes to insert there)
        taken: set[tuple[int, int]] = set()
        for number, phrase in enumerate(phrases):
            try:
                span = _span(phrase, caption, taken)
            except BadSample as error:
                yield Rejected(f"{origin} phrase {number}", error.reason, error.detail)
                continue
            taken.add(span)
            boxes: list[Thousandths] = []
            yield from _convert_boxes(phrase.get("boxes"), box_format, image, boxes, f"{origin} phrase {number}")
            if boxes:
                insertions.append((span[1], f" {write_boxes(boxes)}"))
        if not insertions:
            raise BadSample("no_boxes", "no phrase of the caption has a valid box")

        text, done = "<image>", 0
        for end, written in sorted(insertions, key=lambda insertion: insertion[0]):
            text += escape_placeholders(caption[done:end]) + written
            done = end
        text += escape_placeholders(caption[done:])
        yield Draft({"domain": "grounding", "text": text}, [image.media], origin=origin)


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
            box = read_box(values, box_format, image.width, image.height)
            into.append(to_thousandths(box, image.width, image.height))
        except BadSample as error:
            given = "" if box_format == "xyxy" else f"{str(values)[:80]} ({box_format}), in pixels "
            yield Rejected(f"{origin} box {number}", error.reason, given + error.detail)


# --- COCO -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Coco:
    """Content of a file of COCO instances."""

    images: list[dict[str, Any]]  # in the order of the file
    names: dict[Any, Any]  # id of a category -> its name
    annotations: dict[Any, list[dict[str, Any]]]  # id of an image -> its annotations, without those of crowds


@lru_cache(maxsize=1)
def _coco(path: str) -> _Coco:
    content = load_json(path)
    lists = {}
    for key, ids in (("images", ["id"]), ("categories", ["id"]), ("annotations", ["image_id", "category_id"])):
        listed = content.get(key) if isinstance(content, dict) else None
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise DataError(
                f'{path} has no list "{key}": give COCO instances, or JSON lines in a file ending in .jsonl'
            )
        if odd := [entry for entry in listed if any(isinstance(entry.get(name), dict | list) for name in ids)]:
            raise DataError(f'{path}: an id in "{key}" is neither a number nor a text: fix {str(odd[0])[:120]}')
        lists[key] = listed
    annotations: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in lists["annotations"]:
        if not annotation.get("iscrowd"):
            annotations[annotation.get("image_id")].append(annotation)
    names = {category.get("id"): category.get("name") for category in lists["categories"]}
    return _Coco(lists["images"], names, annotations)


def _coco_units(path: str) -> list[Unit]:
    count = len(_coco(path).images)
    return [
        Unit(path, start, min(start + LINES_PER_UNIT, count), bytes=IMAGE_BYTES * min(LINES_PER_UNIT, count - start))
        for start in range(0, count, LINES_PER_UNIT)
    ]


def _check_size(entry: dict[str, Any], image: AnnotatedImage) -> None:
    """Raise BadSample if the boxes were drawn on an image of another size, such as one before it was resized."""
    for side, actual in (("width", image.width), ("height", image.height)):
        if entry.get(side) not in (None, actual):
            detail = f'"{side}" is {entry[side]!r}, that of the image {actual}: give the image that was annotated'
            raise BadSample("bad_record", detail)


def _read_coco(unit: Unit, folder: Path) -> Iterator[Draft | Rejected]:
    """Yield one sample per image. Regions marked `iscrowd` are skipped: they are not single objects."""
    coco = _coco(unit.path)
    for entry in coco.images[unit.start : unit.stop]:
        origin = f"{Path(unit.path).name}:{entry.get('file_name')}"
        try:
            image = read_image(entry.get("file_name"), folder)
            _check_size(entry, image)
            objects: dict[str, list[Thousandths]] = {}
            for annotation in coco.annotations.get(entry.get("id"), ()):
                where = f"{origin} annotation {annotation.get('id')}"
                name = coco.names.get(annotation.get("category_id"))
                if not isinstance(name, str) or not name:
                    yield Rejected(where, "bad_phrase", f"no category has the id {annotation.get('category_id')!r}")
                    continue
                boxes: list[Thousandths] = []
                yield from _convert_boxes([annotation.get("bbox")], "xywh", image, boxes, where)
                objects.setdefault(name, []).extend(boxes)
            lines = [f"{escape_placeholders(name)} {write_boxes(boxes)}" for name, boxes in objects.items() if boxes]
            if not lines:
                raise BadSample("no_boxes", "no annotation of the image has a valid box")
            yield Draft({"domain": "grounding", "text": "<image>" + "\n".join(lines)}, [image.media], origin=origin)
        except BadSample as error:
            yield Rejected(origin, error.reason, error.detail)
