"""Pictures with the boxes of things in them: captions with phrase boxes, and COCO's instances.

A caption keeps its words; the boxes follow the phrase that they belong to, in thousandths (see boxes.py):

    {"image": "cat.jpg", "caption": "The cat sleeps.", "box_format": "xyxy",
     "phrases": [{"start": 0, "end": 7, "boxes": [[65, 24, 346, 273]]}]}

    <image>The cat [[101,80,540,910]] sleeps.

A phrase may also be given as {"text": "The cat"}: the first place in the caption that no earlier phrase has taken.
COCO's instances (annotations with `bbox` and `category_id`) become one line a category:

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
from data_pipeline.inputs.flow import literal
from data_pipeline.inputs.records.annotations import (
    LINES_A_UNIT,
    PICTURE_BYTES,
    Picture,
    line_units,
    load_json,
    read_objects,
    read_picture,
)
from data_pipeline.media.boxes import BoxFormat, Thousandths, read_box, to_thousandths, write_boxes


@dataclass(frozen=True)
class Grounding:
    """JSON-lines files of captions with phrases, and COCO instances (files that end in .json).

    images: the folder that picture names are relative to; empty: the annotation file's own.
    box_format: how the boxes of JSON lines are written, where a line does not say it itself.
    """

    paths: tuple[str, ...]
    images: str = ""
    box_format: BoxFormat = "xyxy"

    def units(self) -> Sequence[Unit]:
        _coco.cache_clear()  # the file may be another one by now
        units: list[Unit] = []
        for path in self.paths:
            units += _coco_units(path) if path.endswith(".json") else line_units(path, bytes_a_line=PICTURE_BYTES)
        return units

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
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
        picture = read_picture(record.get("image"), folder)

        placed: list[tuple[int, str]] = []  # (where it goes, what is written there)
        taken: set[tuple[int, int]] = set()
        for number, phrase in enumerate(phrases):
            try:
                span = _span(phrase, caption, taken)
            except BadSample as error:
                yield Rejected(f"{origin} phrase {number}", error.reason, error.detail)
                continue
            taken.add(span)
            boxes: list[Thousandths] = []
            yield from _usable(phrase.get("boxes"), box_format, picture, boxes, f"{origin} phrase {number}")
            if boxes:
                placed.append((span[1], f" {write_boxes(boxes)}"))
        if not placed:
            raise BadSample("no_boxes", "no phrase of the caption has a valid box")

        text, done = "<image>", 0
        for end, written in sorted(placed, key=lambda item: item[0]):
            text += literal(caption[done:end]) + written
            done = end
        yield Draft({"domain": "grounding", "text": text + literal(caption[done:])}, [picture.media], origin=origin)


def _span(phrase: Any, caption: str, taken: set[tuple[int, int]]) -> tuple[int, int]:
    """Where in the caption a phrase stands: [start, end)."""
    if not isinstance(phrase, dict):
        raise BadSample("bad_phrase", "a phrase is an object")
    start, end, text = phrase.get("start"), phrase.get("end"), phrase.get("text")
    if isinstance(start, int) and isinstance(end, int):
        if not 0 <= start < end <= len(caption):
            raise BadSample("bad_phrase", f"{start} to {end} is no part of a caption of {len(caption)} characters")
        return start, end
    if not isinstance(text, str) or not text:
        raise BadSample("bad_phrase", 'a phrase needs "start" and "end", or "text"')
    start = caption.find(text)
    while start >= 0 and any(start < other_end and other_start < start + len(text) for other_start, other_end in taken):
        start = caption.find(text, start + 1)
    if start < 0:
        raise BadSample("bad_phrase", f"the caption does not hold {text[:80]!r} (once more)")
    return start, start + len(text)


def _usable(
    boxes: Any, box_format: BoxFormat, picture: Picture, into: list[Thousandths], origin: str
) -> Iterator[Rejected]:
    """Adds the valid ones of an annotation's boxes to `into`; the others are dropped, each with its reason."""
    if not isinstance(boxes, list):
        yield Rejected(origin, "bad_box", '"boxes" must be a list of boxes')
        return
    for number, values in enumerate(boxes):
        try:
            box = read_box(values, box_format, picture.width, picture.height)
            into.append(to_thousandths(box, picture.width, picture.height))
        except BadSample as error:
            given = "" if box_format == "xyxy" else f"{str(values)[:80]} ({box_format}), in pixels "
            yield Rejected(f"{origin} box {number}", error.reason, given + error.detail)


# --- COCO -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Coco:
    """images: in their order; names: of categories by id; annotations: by picture, those of single things alone."""

    images: list[dict[str, Any]]
    names: dict[Any, Any]
    annotations: dict[Any, list[dict[str, Any]]]


@lru_cache(maxsize=1)
def _coco(path: str) -> _Coco:
    """Raises DataError for what are no COCO instances."""
    content = load_json(path)
    lists = {}
    for key, ids in (("images", ["id"]), ("categories", ["id"]), ("annotations", ["image_id", "category_id"])):
        listed = content.get(key) if isinstance(content, dict) else None
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise DataError(
                f'{path} has no list "{key}": give COCO instances, or JSON lines in a file ending in .jsonl'
            )
        if odd := [entry for entry in listed if any(isinstance(entry.get(name), dict | list) for name in ids)]:
            raise DataError(f'{path}: an id in "{key}" is neither a number nor a text: mend {str(odd[0])[:120]}')
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
        Unit(path, start, min(start + LINES_A_UNIT, count), bytes=PICTURE_BYTES * min(LINES_A_UNIT, count - start))
        for start in range(0, count, LINES_A_UNIT)
    ]


def _read_coco(unit: Unit, folder: Path) -> Iterator[Draft | Rejected]:
    """One sample a picture. Regions marked iscrowd are no single things, so they are left out."""
    coco = _coco(unit.path)
    for image in coco.images[unit.start : unit.stop]:
        origin = f"{Path(unit.path).name}:{image.get('file_name')}"
        try:
            picture = read_picture(image.get("file_name"), folder)
            things: dict[str, list[Thousandths]] = {}
            for annotation in coco.annotations.get(image.get("id"), ()):
                where = f"{origin} annotation {annotation.get('id')}"
                name = coco.names.get(annotation.get("category_id"))
                if not isinstance(name, str) or not name:
                    yield Rejected(where, "bad_phrase", f"no category has the id {annotation.get('category_id')!r}")
                    continue
                boxes: list[Thousandths] = []
                yield from _usable([annotation.get("bbox")], "xywh", picture, boxes, where)
                things.setdefault(name, []).extend(boxes)
            lines = [f"{literal(name)} {write_boxes(boxes)}" for name, boxes in things.items() if boxes]
            if not lines:
                raise BadSample("no_boxes", "no annotation of the picture has a valid box")
            yield Draft({"domain": "grounding", "text": "<image>" + "\n".join(lines)}, [picture.media], origin=origin)
        except BadSample as error:
            yield Rejected(origin, error.reason, error.detail)
