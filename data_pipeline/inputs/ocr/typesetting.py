"""Typesetting: text into lines of a given width, and lines into a mask with the bounding box of each."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from data_pipeline.errors import BadSample
from data_pipeline.inputs.ocr.fonts import can_shape
from data_pipeline.media.boxes import Box

# Characters that may not begin, or end, a line.
NOT_FIRST = "、。，．：；？！）］｝」』】〉》〕’”…ー々ぁぃぅぇぉっゃゅょァィゥェォッャュョ,.:;?!)]}%"
NOT_LAST = "（［｛「『【〈《〔‘“([{"

Line = tuple[str, int]  # a line, and the offset in the text at which the next one begins


@dataclass(frozen=True)
class TextMask:
    """Typeset text, not yet coloured."""

    mask: Image.Image  # mode L: 255 where a glyph covers a pixel
    boxes: tuple[Box, ...]  # bounding box of each line's glyphs, in pixels of the mask; none for blank lines


def clean(text: str) -> str:
    """Return one paragraph as it can be drawn: composed letters, single spaces, no control characters.

    Of the formatting characters only the joiners stay, which some scripts need.
    """
    composed = unicodedata.normalize("NFC", text)
    visible = (" " if letter.isspace() else letter for letter in composed if letter.isspace() or _is_visible(letter))
    return " ".join("".join(visible).split())


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> Iterator[Line]:
    """Yield the lines of a paragraph.

    Lines break at spaces and, by the rules of Chinese and Japanese, beside wide letters. They break inside a word only
    if the word is longer than a line.

    Args:
        text: One paragraph.
        font: The font that measures it.
        width: Of a line, in pixels.
    """
    line, begin = "", 0
    for start, end in _unbreakable_spans(text):
        if not line:
            begin = start
        if font.getlength(text[begin:end]) <= width:
            line = text[begin:end]
            continue
        if line:
            yield line, start
        begin = start
        while font.getlength(text[begin:end]) > width and (cut := _cut_position(text, begin, end, font, width)) < end:
            yield text[begin:cut], cut
            begin = cut
        line = text[begin:end]
    if line:
        yield line, len(text)


def runs_leftward(text: str) -> bool:
    """Return whether the first letter with a direction runs from right to left."""
    kinds = (unicodedata.bidirectional(letter) for letter in text)
    return next((kind != "L" for kind in kinds if kind in ("L", "R", "AL")), False)


def draw_lines(
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont,
    *,
    pitch: int,
    align: Literal["left", "centre", "right"],
    height: int = 0,
) -> TextMask:
    """Draw lines as a mask that is as large as their glyphs.

    Args:
        lines: The lines; "" for a blank one.
        font: The font.
        pitch: Pixels from one baseline to the next.
        align: How lines are aligned.
        height: Least height of the mask in pixels.

    Raises:
        BadSample: blank_text, if the font draws nothing for all of the lines.
    """
    direction = "rtl" if can_shape() and runs_leftward("".join(lines)) else None
    lengths = [font.getlength(line, direction=direction) for line in lines]
    shift = {"left": 0.0, "centre": 0.5, "right": 1.0}[align]
    positions = [
        (round((max(lengths) - length) * shift), pitch * number, line)
        for number, (line, length) in enumerate(zip(lines, lengths, strict=True))
        if line
    ]
    drawn = [_draw_line(line, font, direction) for _, _, line in positions]
    boxes: list[Box] = []
    for (x, y, _), (image, left, top) in zip(positions, drawn, strict=True):
        if found := image.getbbox():
            boxes.append((x + left + found[0], y + top + found[1], x + left + found[2], y + top + found[3]))
    if not boxes:
        raise BadSample("blank_text", f"the font draws nothing for {''.join(lines)[:60]!r}")
    x0, y0 = min(box[0] for box in boxes), min(box[1] for box in boxes)
    x1, y1 = max(box[2] for box in boxes), max(box[3] for box in boxes)
    mask = Image.new("L", (int(x1 - x0), max(int(y1 - y0), height)))
    for (x, y, _), (image, left, top) in zip(positions, drawn, strict=True):
        mask.paste(255, (int(x + left - x0), int(y + top - y0)), image)
    return TextMask(mask, tuple((box[0] - x0, box[1] - y0, box[2] - x0, box[3] - y0) for box in boxes))


def _draw_line(line: str, font: ImageFont.FreeTypeFont, direction: str | None) -> tuple[Image.Image, int, int]:
    """Return a line's mask, and the position of its upper left corner relative to the start of the baseline."""
    left, top, right, bottom = font.getbbox(line, direction=direction, anchor="ls")
    corner = math.floor(left) - 1, math.floor(top) - 1
    image = Image.new("L", (math.ceil(right) + 1 - corner[0], math.ceil(bottom) + 1 - corner[1]))
    ImageDraw.Draw(image).text((-corner[0], -corner[1]), line, 255, font, anchor="ls", direction=direction)
    return image, *corner


def _is_visible(letter: str) -> bool:
    return letter in "\u200c\u200d" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs")


def _unbreakable_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield the [start, end) of every part that a line break may not divide, without spaces."""
    start = None
    for index, letter in enumerate(text):
        if letter == " ":
            if start is not None:
                yield start, index
            start = None
        elif start is None:
            start = index
        elif _may_break(text[index - 1], letter):
            yield start, index
            start = index
    if start is not None:
        yield start, len(text)


def _may_break(before: str, after: str) -> bool:
    return (_is_wide(before) or _is_wide(after)) and after not in NOT_FIRST and before not in NOT_LAST


def _is_wide(letter: str) -> bool:
    return unicodedata.east_asian_width(letter) in "WF"


def _cut_position(text: str, begin: int, end: int, font: ImageFont.FreeTypeFont, width: float) -> int:
    """Return where to divide a word that is longer than a line: after the most letters that fit, but at least one.

    A combining mark stays with its letter.
    """
    fits, too_far = begin + 1, end
    while too_far - fits > 1:
        middle = (fits + too_far) // 2
        if font.getlength(text[begin:middle]) <= width:
            fits = middle
        else:
            too_far = middle
    while fits < end and unicodedata.category(text[fits]).startswith("M"):
        fits += 1
    return fits
