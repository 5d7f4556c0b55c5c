"""The marks <ref-object> and <bbox> of ms-swift, which stand for what the field `objects` of the record lists in order.

    "<image>Find <ref-object>"  "<bbox>"      {"ref": ["player"], "bbox": [[30, 10, 120, 160]]}      an image of 300x168
    "<image>Find player"        "[[100,59,400,952]]"

`bbox_type` is real (pixels, the default), norm1 (0 to 1) or norm1000; `image_id` names the image of each box from 0, by
default the first. The older form is a list of {"caption", "bbox", "bbox_type", "image"}.

ms-swift reads images as they are stored, people see them upright. So an image with an EXIF orientation needs its
`width` and `height` in `objects`, lists of one number per image, which tell where the boxes were drawn: see
media/box_frames.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Media
from data_pipeline.media.box_frames import BoxFrame, find_frame
from data_pipeline.media.boxes import STEPS, BoxFormat, read_box, to_thousandths, write_boxes
from data_pipeline.media.image_files import probe_frame

OBJECTS = "objects"
_REF, _BOX = "<ref-object>", "<bbox>"
_MARK = re.compile(f"{_REF}|{_BOX}")
_STEPS = BoxFrame(STEPS, STEPS, STEPS, STEPS)  # of boxes that are not given in pixels
_TYPES: dict[str, BoxFormat] = {"real": "xyxy", "norm1": "normalised", "norm1000": "thousandths"}


def has_marks(text: str) -> bool:
    """Return whether a text has a mark. The tags of <bbox>...</bbox> are not marks."""
    return _REF in text or (_BOX in text and "</bbox>" not in text)


def fill(record: dict[str, Any], images: Sequence[Media]) -> dict[str, Any]:
    """Return a `chat` record with its marks replaced by what they stand for.

    Args:
        record: The record; what is used of its `objects` is removed.
        images: The images of the record.

    Raises:
        BadSample: media_mismatch, size_mismatch, bad_record, bad_box or unsupported_content.
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
    for name, given in ((_REF, refs), (_BOX, boxes)):
        written = sum(turn["content"].count(name) for turn in messages)
        if written != len(given) and written:
            raise BadSample("media_mismatch", f'{written} {name} in the text but {len(given)} in "{OBJECTS}"')
    used = {key for key, name in (("ref", _REF), ("bbox", _BOX)) if any(name in turn["content"] for turn in messages)}
    sizes = _sizes(objects)
    written_boxes = [_written(box, kind, image, images, sizes) for box, kind, image in boxes if "bbox" in used]
    values = {_REF: refs, _BOX: written_boxes}
    left: dict[str, Iterator[str]] = {name: iter(given) for name, given in values.items()}
    filled = [
        {**turn, "content": _MARK.sub(lambda found: next(left[found.group()]), turn["content"])} for turn in messages
    ]
    rest = {key: value for key, value in record.items() if key != OBJECTS}
    if isinstance(objects, dict) and (unused := objects.keys() - used - {"bbox_type", "image_id", "width", "height"}):
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


def _sizes(objects: Any) -> Sequence[tuple[Any, Any]]:
    """Return the (width, height) of each image that `objects` gives."""
    given = objects if isinstance(objects, dict) else {}
    widths, heights = given.get("width"), given.get("height")
    return list(zip(widths, heights, strict=False)) if isinstance(widths, list) and isinstance(heights, list) else []


def _frame(image: int, images: Sequence[Media], sizes: Sequence[tuple[Any, Any]]) -> BoxFrame:
    """Return the frame in which the boxes of an image count. Raises BadSample: size_mismatch."""
    (height, width), orientation = probe_frame(images[image].data)
    size = sizes[image] if image < len(sizes) else (None, None)
    if size == (None, None) and orientation > 1:
        raise BadSample(
            "size_mismatch",
            f'image {image} is turned by its EXIF orientation ({orientation}), and "{OBJECTS}" has no "width" and '
            '"height" that tell whether its boxes were drawn before that: turn its pixels, and remove the orientation',
        )
    return find_frame(size, (width, height), orientation)


def _written(values: Any, kind: str, image: Any, images: Sequence[Media], sizes: Sequence[tuple[Any, Any]]) -> str:
    """Return a box, or a list of boxes, as the model writes it."""
    if kind not in tuple(_TYPES):
        raise BadSample("unsupported_content", f'"bbox_type" {str(kind)[:40]!r}: it must be one of {", ".join(_TYPES)}')
    if isinstance(image, int) and 0 <= image < len(images):
        frame = _frame(image, images, sizes)
    elif kind == "real" or images:
        raise BadSample("media_mismatch", f"a box lies in image {str(image)[:20]} of {len(images)}, counted from 0")
    else:
        frame = _STEPS
    if kind != "real":  # of any size
        frame = replace(_STEPS, orientation=frame.orientation)
    boxes = values if isinstance(values, list) and values and isinstance(values[0], list) else [values]
    return write_boxes(_thousandths(box, kind, frame) for box in boxes)


def _thousandths(values: Any, kind: str, frame: BoxFrame) -> tuple[int, int, int, int]:
    if isinstance(values, list) and len(values) == 2:
        raise BadSample("unsupported_content", f"{str(values)[:80]} is a point: only boxes are supported")
    if isinstance(values, list) and len(values) == 4 and all(isinstance(value, int | float) for value in values):
        x1, y1, x2, y2 = values
        values = [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]  # ms-swift accepts corners in any order
    width, height = frame.stored_width, frame.stored_height
    if frame.orientation > 4:
        width, height = height, width
    return to_thousandths(frame.upright(read_box(values, _TYPES[kind], frame.width, frame.height)), width, height)
