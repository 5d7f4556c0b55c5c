"""Answers from closed sets: yes or no, left or right, above or below, the points of the compass and others.

A phrase is read as one value per axis, or as nothing if it has any other word:

    "On the left side"      ->   {across: {left}}
    "upper-left corner"     ->   {upright: {above}, across: {left}}
    "left or right"         ->   {across: {left, right}}
    "left of the tree"      ->   None

So an answer from the same set as the reference is decided by rule both ways, and no judge is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

from rewards.plain_text import plain
from rewards.words import TRUTH

Values: TypeAlias = dict[str, frozenset[str]]

MAX_CHARACTERS = 80

# axis -> value -> the words that say it. A word of several axes belongs to the last of them: `right` is a side.
SETS: Mapping[str, Mapping[str, str]] = {
    "truth": TRUTH,
    "across": {
        "left": "left leftward leftwards 左 左边 左侧 左面 左方",
        "right": "right rightward rightwards 右 右边 右侧 右面 右方",
    },
    "upright": {
        "above": "above over up upper upward upwards top atop 上 上面 上方 上边",
        "below": "below under underneath beneath down lower downward downwards bottom 下 下面 下方 下边",
    },
    "depth": {"front": "front 前 前面 前方", "behind": "behind back rear 后 后面 后方"},
    "containment": {
        "inside": "inside within indoor indoors 里面 内 里 室内",
        "outside": "outside outdoor outdoors 外面 外 室外",
    },
    "compass_north": {"north": "north northern 北", "south": "south southern 南"},
    "compass_east": {"east": "east eastern 东", "west": "west western 西"},
    "rotation": {
        "clockwise": "clockwise 顺时针",
        "anticlockwise": "anticlockwise counterclockwise 逆时针",
    },
    "orientation": {"horizontal": "horizontal horizontally 水平", "vertical": "vertical vertically 垂直 竖直"},
    "distance": {"nearer": "near nearer close closer 近", "farther": "far farther further 远"},
    "size": {"larger": "larger bigger 更大", "smaller": "smaller 更小"},
    "order": {"before": "before earlier 之前 先", "after": "after later 之后 后来"},
}
_FILLER = re.compile(r"on|to|the|of|in|at|side|hand|its?|is|are|towards?|corner|part|and|or|both|from")
_VALUE_OF = {
    word: (axis, value) for axis, values in SETS.items() for value, words in values.items() for word in words.split()
}
_COMPOUNDS = re.compile(r"\b(?:(north|south)[- ]?(east|west)(?:ern)?|(counter|anti)[- ]clockwise|([ns])([ew]))\b")
_LONG_NAMES = {"n": "north", "s": "south", "e": "east", "w": "west"}
_CHINESE_PAIRS = re.compile(r"([左右东西])([上下南北])|([上下东西南北])([左右东西南北])")
_BEGINS = re.compile(r"(yes|no|true|false)\s*[,.;:!]\s*(.+)")


def values_in(text: str) -> Values | None:
    """Return the values that a short text names, by axis; None if it has any other word, or no value."""
    if len(text) > MAX_CHARACTERS:
        return None
    bare = plain(text)
    if begins := _BEGINS.fullmatch(bare):
        return _explained(begins[1], set(re.findall(r"\w+", begins[2])))
    words = re.findall(r"[^\W\d_]+", _apart(bare)) if not re.search(r"\d", bare) else []
    found: dict[str, set[str]] = {}
    for word in words:
        if word in _VALUE_OF:
            axis, value_name = _VALUE_OF[word]
            found.setdefault(axis, set()).add(value_name)
        elif not _FILLER.fullmatch(word):
            return None
    return {axis: frozenset(names) for axis, names in found.items()} or None


def _explained(word: str, rest: set[str]) -> Values | None:
    """Return the value of "Yes, it is": both values for "yes, no", none for "yes, it is not"."""
    axis, value = _VALUE_OF[word]
    values = frozenset(
        [value, *(_VALUE_OF[other][1] for other in rest & _VALUE_OF.keys() if _VALUE_OF[other][0] == axis)]
    )
    return {axis: values} if value == "no" or "not" not in rest else None


def decide(given: Values, wanted: Values) -> bool | None:
    """Return whether two values agree; None if one says more than the other and nothing that contradicts it.

    >>> decide({"across": frozenset(["left"])}, {"across": frozenset(["right"])})
    False
    """
    if given == wanted:
        return True
    shared = given.keys() & wanted.keys()
    return False if any(given[axis] != wanted[axis] for axis in shared) else None


def _apart(text: str) -> str:
    """Write "northeast", "ne" and "左上角" as two words."""
    text = text.replace("角", " ")
    text = _COMPOUNDS.sub(
        lambda found: (
            "anticlockwise"
            if found[3]
            else " ".join(_LONG_NAMES.get(part, part) for part in found.group(1, 2, 4, 5) if part)
        ),
        text,
    )
    return _CHINESE_PAIRS.sub(lambda found: " ".join(part for part in found.groups() if part), text)
