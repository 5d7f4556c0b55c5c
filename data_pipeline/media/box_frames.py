"""The image in which an annotation counts its pixels, which may not be the image of today.

Images are often shrunk after they were annotated, and cameras store many of them turned, with an EXIF orientation that
viewers obey. An annotation says in which image it counts by the width and height that it gives:

    given       file        EXIF      the boxes are
    1000 x 750  1000 x 750  -         taken as they are
    4000 x 3000 1000 x 750  -         divided by four
    1000 x 750  1000 x 750  turned    turned, as the image is: they were drawn in the stored image
    750 x 1000  1000 x 750  turned    taken as they are: they were drawn in the upright image
    1000 x 750  1000 x 750  half turn drawn in which of them is not known: `size_mismatch`
    800 x 800   1000 x 750  -         another image: `size_mismatch`

Without a width and height, boxes count in the upright image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import BadSample
from data_pipeline.media.boxes import Box

ROUNDING = 1.0  # pixels by which the sides of the smaller of two images may differ from exact proportions

# EXIF orientation -> where a point (x, y) of the stored image of W x H pixels lies in the upright one.
_UPRIGHT: dict[int, Callable[[float, float, float, float], tuple[float, float]]] = {
    1: lambda x, y, w, h: (x, y),
    2: lambda x, y, w, h: (w - x, y),
    3: lambda x, y, w, h: (w - x, h - y),
    4: lambda x, y, w, h: (x, h - y),
    5: lambda x, y, w, h: (y, x),
    6: lambda x, y, w, h: (h - y, x),
    7: lambda x, y, w, h: (h - y, w - x),
    8: lambda x, y, w, h: (y, w - x),
}


@dataclass(frozen=True)
class BoxFrame:
    """The image in which an annotation counts its pixels, and how it became the upright image of the file."""

    width: float  # pixels of the annotated image
    height: float
    stored_width: int  # pixels of the image before it is turned
    stored_height: int
    orientation: int = 1  # EXIF, 1 to 8: how it is turned

    def upright(self, box: Box) -> Box:
        """Return a box of the annotated image in pixels of the upright image."""
        x1, y1, x2, y2 = box
        if (self.width, self.height) != (self.stored_width, self.stored_height):
            x1, x2 = (x * self.stored_width / self.width for x in (x1, x2))
            y1, y2 = (y * self.stored_height / self.height for y in (y1, y2))
        turn = _UPRIGHT[self.orientation]
        (ax, ay), (bx, by) = (turn(x, y, self.stored_width, self.stored_height) for x, y in ((x1, y1), (x2, y2)))
        return min(ax, bx), min(ay, by), max(ax, bx), max(ay, by)


def find_frame(given: tuple[Any, Any], stored: tuple[int, int], orientation: int) -> BoxFrame:
    """Return the frame of an annotation that gives a width and height.

    Args:
        given: Width and height that the annotation gives; None each: it gives none.
        stored: (width, height) of the file before it is turned, pixels.
        orientation: EXIF orientation of the file, 1 to 8.

    Raises:
        BadSample: `size_mismatch`, if the file has other proportions, or if the size does not tell whether the boxes
            were drawn before or after the image is turned.
    """
    upright = (stored[1], stored[0]) if orientation > 4 else stored
    if given == (None, None):
        return BoxFrame(*upright, *upright)
    width, height = given
    if not all(isinstance(side, (int, float)) and not isinstance(side, bool) and 1 <= side < 1e9 for side in given):
        raise BadSample("size_mismatch", f"width {width!r} and height {height!r} are not the size of an image")
    as_stored, as_upright = _same_shape(given, stored), _same_shape(given, upright)
    if not as_stored and not as_upright:
        raise BadSample(
            "size_mismatch",
            f"the annotation is of an image of {width:g}x{height:g} pixels, but the file has {upright[0]}x{upright[1]}",
        )
    if as_stored and as_upright and orientation > 1:
        raise BadSample(
            "size_mismatch",
            f"the file is turned by its EXIF orientation ({orientation}), and {width:g}x{height:g} does not tell "
            "whether its boxes were drawn before or after that: turn its pixels, and remove the orientation",
        )
    return BoxFrame(width, height, *stored, orientation) if as_stored else BoxFrame(width, height, *upright)


def _same_shape(given: tuple[float, float], size: tuple[int, int]) -> bool:
    """Return whether an image of the given size, shrunk or enlarged, may have this size in whole pixels."""
    (width, height), (w, h) = given, size
    return abs(w * height / width - h) <= max(ROUNDING, ROUNDING * w / width) or abs(h * width / height - w) <= max(
        ROUNDING, ROUNDING * h / height
    )
