"""Captions in which marks of other models give the boxes of phrases, in thousandths.

Qwen-VL     <ref>A cat</ref><box>(101,80),(540,910)</box>
InternVL    <ref>A cat</ref><box>[[101, 80, 540, 910]]</box>
Qwen2-VL    <|object_ref_start|>A cat<|object_ref_end|><|box_start|>(101,80),(540,910)<|box_end|>
"""

from __future__ import annotations

import re
from typing import Any

from data_pipeline.errors import BadSample

_OPEN = {"ref": r"<ref>|<\|object_ref_start\|>", "box": r"<box>|<\|box_start\|>"}
_CLOSE = {"ref": r"</ref>|<\|object_ref_end\|>", "box": r"</box>|<\|box_end\|>"}
_BOX = re.compile(f"(?:{_OPEN['box']})(.*?)(?:{_CLOSE['box']})", re.DOTALL)
_PHRASE = re.compile(
    f"(?:{_OPEN['ref']})(.*?)(?:{_CLOSE['ref']})((?:\\s*(?:{_OPEN['box']}).*?(?:{_CLOSE['box']}))*)", re.DOTALL
)
_MARK = re.compile("|".join((*_OPEN.values(), *_CLOSE.values())))
_IMAGE = re.compile(r"^\s*(?:\w+ \d+:\s*)?(?:<img>.*?</img>|<image>|<\|vision_start\|>.*?<\|vision_end\|>)\s*")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def is_marked(text: str) -> bool:
    """Return whether a text has the mark of a box."""
    return re.search(_OPEN["box"], text) is not None


def read_marks(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Return a caption without its marks, and its phrases. A mark of the image before it is removed.

    Raises:
        BadSample: `bad_phrase`, for a box without a phrase, or marks that do not pair.
    """
    text = _IMAGE.sub("", text, count=1)
    caption, phrases, done = "", [], 0
    for found in _PHRASE.finditer(text):
        caption += text[done : found.start()]
        boxes = [box for marked in _BOX.findall(found[2]) for box in _boxes(marked)]
        if boxes:
            phrases.append({"start": len(caption), "end": len(caption) + len(found[1]), "boxes": boxes})
        caption += found[1]
        done = found.end()
    caption += text[done:]
    if left := _MARK.search(caption):
        raise BadSample("bad_phrase", f"{left[0]} has no phrase in <ref> before it, or its end is missing")
    return caption, phrases


def _boxes(marked: str) -> list[list[float]]:
    numbers = [float(number) for number in _NUMBER.findall(marked)]
    return [numbers[start : start + 4] for start in range(0, len(numbers), 4)]
