"""Rectangles of a page, and the turn that makes its text upright.

A `turns` argument is the number of clockwise turns by 90 degrees that make the text of a page upright.
"""

from __future__ import annotations

from dataclasses import dataclass

Bounds = tuple[float, float, float, float]  # (left, bottom, right, top) in a PDF's coordinates, where y grows upwards


@dataclass(frozen=True)
class Rect:
    """A rectangle of a page, in points from its upper left corner."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        """Its width; negative if right < left."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Its height; negative if bottom < top."""
        return self.bottom - self.top

    @property
    def area(self) -> float:
        """Its area; 0 if width or height is negative."""
        return max(self.width, 0.0) * max(self.height, 0.0)

    @property
    def middle(self) -> float:
        """The y coordinate of its centre."""
        return (self.top + self.bottom) / 2

    def union(self, other: Rect) -> Rect:
        """Return the smallest rectangle that contains both."""
        return Rect(
            min(self.left, other.left),
            min(self.top, other.top),
            max(self.right, other.right),
            max(self.bottom, other.bottom),
        )

    def intersection(self, other: Rect) -> Rect:
        """Return the common rectangle. Its width or height is <= 0 if they do not overlap."""
        return Rect(
            max(self.left, other.left),
            max(self.top, other.top),
            min(self.right, other.right),
            min(self.bottom, other.bottom),
        )

    def grown(self, by: float) -> Rect:
        """Return the rectangle with every side moved outwards."""
        return Rect(self.left - by, self.top - by, self.right + by, self.bottom + by)

    def mirrored(self, width: float) -> Rect:
        """Return the rectangle on the mirrored page, which is `width` wide."""
        return Rect(width - self.right, self.top, width - self.left, self.bottom)

    def beside(self, other: Rect) -> bool:
        """Return whether both are in one row: they share half of the smaller height."""
        shared = min(self.bottom, other.bottom) - max(self.top, other.top)
        return shared > 0.5 * max(min(self.height, other.height), 0.1)


@dataclass(frozen=True)
class PageFrame:
    """The visible part of a PDF page, in the file's coordinates, where y grows upwards."""

    left: float
    top: float
    width: float
    height: float

    def size(self, turns: int) -> tuple[float, float]:
        """Return the (width, height) of the turned page."""
        return (self.height, self.width) if turns % 2 else (self.width, self.height)

    def rect(self, bounds: Bounds, turns: int) -> Rect:
        """Return bounds in the file as a rectangle of the turned page."""
        left, bottom, right, top = bounds
        rect = Rect(left - self.left, self.top - top, right - self.left, self.top - bottom)
        for turn in range(turns):
            height = self.width if turn % 2 else self.height
            rect = Rect(height - rect.bottom, rect.left, height - rect.top, rect.right)
        return rect
