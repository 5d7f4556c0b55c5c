"""Boxes in an answer, and how many of them are right.

    "[[100,100,300,300], [5,5]]"     ->   [(100, 100, 300, 300), None]      None: brackets with something else
    "a cat at (100, 100, 300, 300)"  ->   [(100, 100, 300, 300)]
    "(100,100),(300,300)"            ->   [(100, 100, 300, 300)]      two corners
    "[]"                             ->   []

A box is (x1, y1, x2, y2) in thousandths of the image, 0 to 1000, with x1 < x2 and y1 < y2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from rewards.plain_text import half_width

Box: TypeAlias = tuple[float, float, float, float]

LARGEST = 1000
_BRACKETED = re.compile(r"\[([^][(){}<>]*)\]|\(([^][(){}<>]*)\)|\{([^][(){}<>]*)\}|<([^][(){}<>]*)>")
_CORNER = re.compile(r"\s*[\d.]{1,26}\s*,\s*[\d.]{1,26}\s*")
_NUMBER = re.compile(r"\s*(\d{1,5}(?:\.\d{0,20})?)\s*")
_NONE = re.compile(
    r"\b(?:no|none|nothing|null|empty|absent)\b|\bnot (?:present|visible|found|shown|in the)\b|没有|无|不存在|未"
)
_BRACKETS = str.maketrans("【】〔〕「」", "[][][]")


def boxes_in(text: str) -> list[Box | None]:
    """Return what the brackets without others inside hold: a box, or None for anything else with a digit.

    Four numbers without brackets are a box too, where they are the whole text.
    """
    text = half_width(text).translate(_BRACKETS)
    inside = [content for found in _BRACKETED.findall(text) if re.search(r"\d", content := "".join(found))]
    if len(inside) % 2 == 0 and all(_CORNER.fullmatch(content) for content in inside):
        inside = [f"{first},{second}" for first, second in zip(inside[::2], inside[1::2], strict=True)]
    found = [box_of(content) for content in inside]
    if not found and (alone := box_of(text)):
        return [alone]
    return found


def box_of(content: str) -> Box | None:
    """Return the box that four numbers are, separated by commas or space; None if they are none."""
    parts = content.split(",") if "," in content else content.split()
    numbers = [float(found[1]) for part in parts if (found := _NUMBER.fullmatch(part))]
    if len(parts) != 4 or len(numbers) != 4:
        return None
    x1, y1, x2, y2 = numbers
    return (x1, y1, x2, y2) if x1 < x2 <= LARGEST and y1 < y2 <= LARGEST else None


def says_none(text: str) -> bool:
    """Return whether a text without boxes says that there is nothing: "[]", "", "none", "there is no dog"."""
    bare = half_width(text).casefold().strip("[](){}<>\"' \t\n.")
    return not bare or bool(_NONE.search(bare))


def ious(given: Sequence[Box], wanted: Sequence[Box]) -> np.ndarray:
    """Return the area that two boxes share per area that either covers, float64 [wanted, given]."""
    a = np.asarray(given, dtype=np.float64).reshape(1, -1, 4)
    b = np.asarray(wanted, dtype=np.float64).reshape(-1, 1, 4)
    size = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.maximum(size[..., 0], 0) * np.maximum(size[..., 1], 0)
    areas = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b)]
    return shared / (areas[0] + areas[1] - shared)


def matches(given: Sequence[Box], wanted: Sequence[Box], threshold: float) -> int:
    """Return how many pairs of a given and a wanted box have an IoU above a threshold, each box in one pair at most.

    It is the largest number that any assignment reaches. From each wanted box a path of pairs is looked for that
    frees a given box for it. Boxes that a failed search has visited cannot help a later one and are not visited again:
    all failed searches together visit each pair once.
    """
    near = ious(given, wanted) > threshold
    partner = np.full(len(given), -1)  # given box -> wanted box, -1 while it is free
    unvisited = np.ones(len(given), dtype=bool)
    for start in range(len(near)):
        before = unvisited.copy()
        if _find_partner(start, near, partner, unvisited):
            unvisited = before
    return int((partner >= 0).sum())


def _find_partner(start: int, near: np.ndarray, partner: np.ndarray, unvisited: np.ndarray) -> bool:
    """Give a wanted box a partner, and others another one where it takes theirs; mark what was visited."""
    came_from: dict[int, int] = {}  # given box -> the wanted box that reached it
    held: dict[int, int] = {}  # wanted box -> the given box that it has had
    stack = [start]
    while stack:
        wanted = stack.pop()
        reached = near[wanted] & unvisited
        free = reached & (partner < 0)
        if free.any():
            given = int(free.argmax())
            while True:  # pair along the path, back to where it began
                partner[given] = wanted
                if wanted == start:
                    return True
                given = held[wanted]
                wanted = came_from[given]
        unvisited &= ~reached
        for given in np.flatnonzero(reached).tolist():
            came_from[given] = wanted
            held[int(partner[given])] = given
            stack.append(int(partner[given]))
    return False
