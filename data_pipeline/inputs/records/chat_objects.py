"""The marks <ref-object> and <bbox> of ms-swift, which stand for what the field `objects` of the record lists in order.

    "<image>Find <ref-object>"  "<bbox>"      {"ref": ["player"], "bbox": [[30, 10, 120, 160]]}      an image of 300x168
    "<image>Find player"        "[[100,59,400,952]]"

`bbox_type` is real (pixels, the default), norm1 (0 to 1) or norm1000; `image_id` names the image of each box from 0, by
default the first. The older form is a list of {"caption", "bbox", "bbox_type", "image"}.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Media
from data_pipeline.media.boxes import STEPS, BoxFormat, read_box, to_thousandths, write_boxes
from data_pipeline.media.image_files import probe_image

OBJECTS = "objects"
_REF, _BOX = "<ref-object>", "<bbox>"
_MARK = re.compile(f"{_REF}|{_BOX}")
_TYPES: dict[str, BoxFormat] = {"real": "xyxy", "norm1": "normalised", "norm1000": "thousandths"}


def has_marks(text: str) -> bool:
    """Return whether a text has a mark. In <bbox>...</bbox> the tags are no marks."""
    return _REF in text or (_BOX in text and "</bbox>" not in text)


def fill(record: dict[str, Any], images: Sequence[Media]) -> dict[str, Any]:
    """Return a `chat` record with its marks replaced by what they stand for.

    Args:
        record: The record; what is used of its `objects` is removed.
        images: The images of the record.

    Raises:
        BadSample: media_mismatch, bad_record, bad_box or unsupported_content.
    """
    messages = record["messages"]
    if not any(has_marks(turn["content"]) for turn in messages):
        return record
    objects = record.get(OBJECTS)
    if not objects:
        if not images:
            return record
        raise BadSample("media_mismatch", f'the text has {_REF} or {_BOX}, but the record has no "{OBJECTS}"')
    refs, boxes = _old_form(objects) if isinstance(objects, list) else _new_form(objects)
    values = {_REF: refs, _BOX: [_written(box, kind, image, images) for box, kind, image in boxes]}
    for name, given in values.items():
        written = sum(turn["content"].count(name) for turn in messages)
        if written != len(given) and written:
            raise BadSample("media_mismatch", f'{written} {name} in the text but {len(given)} in "{OBJECTS}"')
    used = {key for key, name in (("ref", _REF), ("bbox", _BOX)) if any(name in turn["content"] for turn in messages)}
    left: dict[str, Iterator[str]] = {name: iter(given) for name, given in values.items()}
    filled = [
        {**turn, "content": _MARK.sub(lambda found: next(left[found.group()]), turn["content"])} for turn in messages
    ]
    rest = {key: value for key, value in record.items() if key != OBJECTS}
    if isinstance(objects, dict) and (unused := objects.keys() - used - {"bbox_type", "image_id"}):
        rest[OBJECTS] = {key: value for key, value in objects.items() if key in unused}
    return {**rest, "messages": filled}


def _new_form(objects: Any) -> tuple[list[str], list[tuple[Any, str, Any]]]:
    if not isinstance(objects, dict):
        raise BadSample("bad_record", f'"{OBJECTS}" must be {{"ref": [...], "bbox": [...]}}')
    refs, boxes, images = (objects.get(key) or [] for key in ("ref", "bbox", "image_id"))
    if not all(isinstance(value, list) for value in (refs, boxes, images)):
        raise BadSample("bad_record", f'"ref", "bbox" and "image_id" of "{OBJECTS}" must be lists')
    kind = objects.get("bbox_type") or "real"
    images = [*images, *[0] * (len(boxes) - len(images))]
    return _texts(refs), [(box, kind, image) for box, image in zip(boxes, images, strict=False)]


def _old_form(objects: list[Any]) -> tuple[list[str], list[tuple[Any, str, Any]]]:
    if not all(isinstance(entry, dict) for entry in objects):
        raise BadSample("bad_record", f'"{OBJECTS}" must be a list of {{"caption", "bbox"}}')
    refs = [entry["caption"] for entry in objects if entry.get("caption") is not None]
    boxes = [
        (entry["bbox"], entry.get("bbox_type") or "real", entry.get("image") or 0)
        for entry in objects
        if entry.get("bbox") is not None
    ]
    return _texts(refs), boxes


def _texts(refs: list[Any]) -> list[str]:
    if not all(isinstance(ref, str) for ref in refs):
        raise BadSample("bad_record", f'the names of "{OBJECTS}" must be texts')
    return refs


def _written(values: Any, kind: str, image: Any, images: Sequence[Media]) -> str:
    """Return a box, or a list of boxes, as the model writes it."""
    if kind not in tuple(_TYPES):
        raise BadSample("unsupported_content", f'"bbox_type" {kind!r}: it must be one of {", ".join(_TYPES)}')
    if kind == "real":
        if not isinstance(image, int) or not 0 <= image < len(images):
            raise BadSample("media_mismatch", f"a box lies in image {image!r} of {len(images)}, counted from 0")
        height, width = probe_image(images[image].data)
    else:
        height = width = STEPS
    boxes = values if isinstance(values, list) and values and isinstance(values[0], list) else [values]
    return write_boxes(_thousandths(box, kind, width, height) for box in boxes)


def _thousandths(values: Any, kind: str, width: int, height: int) -> tuple[int, int, int, int]:
    if isinstance(values, list) and len(values) == 2:
        raise BadSample("unsupported_content", f"{values} is a point: only boxes are supported")
    if isinstance(values, list) and len(values) == 4 and all(isinstance(value, int | float) for value in values):
        x1, y1, x2, y2 = values
        values = [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]  # ms-swift accepts corners in any order
    return to_thousandths(read_box(values, _TYPES[kind], width, height), width, height)
