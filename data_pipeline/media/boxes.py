"""Boxes: from what annotations hold to what the model reads and writes, `[[x1,y1,x2,y2],...]`.

The published form counts thousandths of the image's own width and height, as whole numbers from 0 to 999. A number
names the thousandth in which a coordinate lies, and the far edge lies in the last one:

    written = min(floor(1000 * x / width), 999)         read = (written + 0.5) * width / 1000

so that reading gives every coordinate back to within half a step (width / 2000 pixels), the far edge included. In an
image of 500 x 200 pixels:

    (50, 20, 500, 100) -> [[100,100,999,500]]

Pixels are counted from the left and top edges of the upright image: (0, 0, width, height) is all of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from data_pipeline.errors import BadSample

Box = tuple[float, float, float, float]
Thousandths = tuple[int, int, int, int]
BoxFormat = Literal["xyxy", "xywh", "normalised", "thousandths"]

STEPS = 1000
MARGIN = 1.0  # pixels by which an annotation may exceed the image: rounding, or edges counted inclusively

_LARGEST = 1e9  # no coordinate is larger

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_WRITTEN = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


def read_box(values: Any, box_format: BoxFormat, width: float, height: float) -> Box:
    """Return the box of an annotation in pixels, clipped to the image.

    Args:
        values: Four numbers.
        box_format: `xyxy`: corners in pixels; `xywh`: the near corner and the extent, in pixels (COCO); `normalised`:
            corners as fractions of width and height; `thousandths`: corners as models write them, 0 to 999 or 1000.
        width: Pixels of the image.
        height: Pixels of the image.

    Raises:
        BadSample: `bad_box`, for anything but four numbers, fractions where pixels are expected, a box without area, or
            one that exceeds the image by more than a pixel. It names the format that the box may have.
    """
    if not isinstance(values, Sequence) or len(values) != 4 or not all(_is_number(value) for value in values):
        raise BadSample("bad_box", f"{str(values)[:80]}: a box is four numbers")
    x1, y1, x2, y2 = map(float, values)
    given = (x1, y1, x2, y2)
    in_steps = box_format == "thousandths" and all(value == int(value) for value in given)
    if box_format != "normalised" and not in_steps and all(0 <= value <= 1 for value in given):
        unit = "thousandths" if box_format == "thousandths" else "pixels"
        raise BadSample("bad_box", f"{_shown(given)} are fractions, not {unit}: --set box_format=normalised if corners")
    if box_format == "xywh":
        x2, y2 = x1 + x2, y1 + y2
    elif box_format == "normalised":
        x1, y1, x2, y2 = x1 * width, y1 * height, x2 * width, y2 * height
    elif box_format == "thousandths":
        x1, y1, x2, y2 = (STEPS - 1 if value == STEPS else value for value in (x1, y1, x2, y2))
        x1, y1, x2, y2 = to_pixels((x1, y1, x2, y2), width, height)
    try:
        return checked_box((x1, y1, x2, y2), width, height)
    except BadSample as error:
        raise BadSample(error.reason, error.detail + _other_format(given, box_format, width, height)) from error


def _other_format(given: Box, box_format: BoxFormat, width: float, height: float) -> str:
    """Return a hint at the format in which a box that is not valid would be; empty: in none."""
    x1, y1, x2, y2 = given
    if min(given) < 0:
        return ""
    if box_format == "xyxy" and (x1 >= x2 or y1 >= y2) and min(x2, y2) > 0 and x1 + x2 <= width and y1 + y2 <= height:
        return ": x, y, width and height are --set box_format=xywh"
    if box_format == "xywh" and x1 < x2 <= width and y1 < y2 <= height:
        return ": corners are --set box_format=xyxy"
    if box_format in ("xyxy", "xywh") and max(given) <= STEPS and x1 < x2 and y1 < y2:
        return ": corners in thousandths are --set box_format=thousandths"
    return ""


def checked_box(box: Box, width: float, height: float) -> Box:
    """Return a box in pixels, clipped to the image.

    Raises:
        BadSample: `bad_box`, if the box has no area or exceeds the image by more than a pixel.
    """
    x1, y1, x2, y2 = box
    if not (x1 < x2 and y1 < y2):
        raise BadSample("bad_box", f"{_shown(box)} has no area")
    if min(x1, y1) < -MARGIN or x2 > width + MARGIN or y2 > height + MARGIN:
        raise BadSample("bad_box", f"{_shown(box)} exceeds the image of {width:g}x{height:g} pixels")
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if not (clipped[0] < clipped[2] and clipped[1] < clipped[3]):
        raise BadSample("bad_box", f"{_shown(box)} lies outside the image of {width:g}x{height:g} pixels")
    return clipped


def bounding_box(points: Sequence[Sequence[float]]) -> Box:
    """Return the smallest upright box around the (x, y) points of a polygon."""
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    return min(xs), min(ys), max(xs), max(ys)


def to_thousandths(box: Box, width: int, height: int) -> Thousandths:
    """Convert a checked box from pixels to thousandths, 0 to 999.

    Raises:
        BadSample: `bad_box`, if the box is thinner than a thousandth of the image.
    """
    x1, y1, x2, y2 = (
        min(math.floor(STEPS * value / extent), STEPS - 1)
        for value, extent in zip(box, (width, height, width, height), strict=True)
    )
    if x1 >= x2 or y1 >= y2:
        raise BadSample("bad_box", f"{_shown(box)} is less than a thousandth of {width}x{height} pixels across")
    return x1, y1, x2, y2


def to_pixels(box: Box, width: float, height: float) -> Box:
    """Convert a box from thousandths to pixels: the middle of each thousandth."""
    x1, y1, x2, y2 = ((value + 0.5) / STEPS for value in box)
    return x1 * width, y1 * height, x2 * width, y2 * height


def write_boxes(boxes: Iterable[Thousandths]) -> str:
    """Return boxes as text: [(102, 80, 540, 910), ...] -> "[[102,80,540,910],...]"."""
    return json.dumps([list(box) for box in boxes], separators=(",", ":"))


def written_boxes(text: str) -> Iterator[tuple[int, Box]]:
    """Find every box in a text, valid or not, alone or in a list.

    Yields:
        (index into the text, (x1, y1, x2, y2)).
    """
    for found in _WRITTEN.finditer(text):
        x1, y1, x2, y2 = map(float, found.groups())
        yield found.start(), (x1, y1, x2, y2)


def is_valid_box(box: Box) -> bool:
    """Check that a box as it is written lies within 0..999 and has an area."""
    x1, y1, x2, y2 = box
    return 0 <= x1 < x2 < STEPS and 0 <= y1 < y2 < STEPS


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST  # no NaN either


def _shown(box: Box) -> str:
    return "({:g}, {:g}, {:g}, {:g})".format(*box)
