"""Text into lines of a given width, and lines into an ink mask with the box of each."""

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

NOT_FIRST = "、。，．：；？！）］｝」』】〉》〕’”…ー々ぁぃぅぇぉっゃゅょァィゥェォッャュョ,.:;?!)]}%"  # of a line
NOT_LAST = "（［｛「『【〈《〔‘“([{"

Line = tuple[str, int]  # and how much of the text it uses up, with what stands before it


@dataclass(frozen=True)
class Block:
    """mask: how much ink every pixel has, mode L; boxes: where the ink of each line lies, blank lines left out."""

    mask: Image.Image
    boxes: tuple[Box, ...]


def clean(text: str) -> str:
    """One paragraph as it can be drawn and read: composed letters, single spaces, no controls and no formatting but
    the joiners that some scripts spell with."""
    composed = unicodedata.normalize("NFC", text)
    visible = (" " if letter.isspace() else letter for letter in composed if letter.isspace() or _visible(letter))
    return " ".join("".join(visible).split())


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> Iterator[Line]:
    """The lines of a paragraph. Lines break at spaces and around wide letters as
    Chinese and Japanese are broken, and inside a word only where it alone is too long."""
    line, begin = "", 0
    for start, end in _pieces(text):
        if not line:
            begin = start
        if font.getlength(text[begin:end]) <= width:
            line = text[begin:end]
            continue
        if line:
            yield line, start
        begin = start
        while font.getlength(text[begin:end]) > width and (cut := _fitting(text, begin, end, font, width)) < end:
            yield text[begin:cut], cut
            begin = cut
        line = text[begin:end]
    if line:
        yield line, len(text)


def leftward(text: str) -> bool:
    """Whether the first letter with a direction runs from right to left."""
    kinds = (unicodedata.bidirectional(letter) for letter in text)
    return next((kind != "L" for kind in kinds if kind in ("L", "R", "AL")), False)


def set_lines(
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont,
    *,
    pitch: int,
    align: Literal["left", "centre", "right"],
    height: int = 0,
) -> Block:
    """Draws lines, `pitch` pixels from one baseline to the next; "" leaves one empty. The mask is as large as its ink,
    or `height` high if that is more. Raises BadSample `no_ink` if all of it is blank."""
    direction = "rtl" if can_shape() and leftward("".join(lines)) else None
    lengths = [font.getlength(line, direction=direction) for line in lines]
    shift = {"left": 0.0, "centre": 0.5, "right": 1.0}[align]
    places = [
        (round((max(lengths) - length) * shift), pitch * number, line)
        for number, (line, length) in enumerate(zip(lines, lengths, strict=True))
        if line
    ]
    drawn = [_draw_line(line, font, direction) for _, _, line in places]
    inks: list[Box] = []
    for (x, y, _), (image, left, top) in zip(places, drawn, strict=True):
        if found := image.getbbox():
            inks.append((x + left + found[0], y + top + found[1], x + left + found[2], y + top + found[3]))
    if not inks:
        raise BadSample("no_ink", f"the font draws nothing for {''.join(lines)[:60]!r}")
    x0, y0 = min(ink[0] for ink in inks), min(ink[1] for ink in inks)
    x1, y1 = max(ink[2] for ink in inks), max(ink[3] for ink in inks)
    mask = Image.new("L", (int(x1 - x0), max(int(y1 - y0), height)))
    for (x, y, _), (image, left, top) in zip(places, drawn, strict=True):
        mask.paste(255, (int(x + left - x0), int(y + top - y0)), image)
    return Block(mask, tuple((ink[0] - x0, ink[1] - y0, ink[2] - x0, ink[3] - y0) for ink in inks))


def _draw_line(line: str, font: ImageFont.FreeTypeFont, direction: str | None) -> tuple[Image.Image, int, int]:
    """(ink, and where its left top corner lies from the beginning of the baseline)."""
    left, top, right, bottom = font.getbbox(line, direction=direction, anchor="ls")
    corner = math.floor(left) - 1, math.floor(top) - 1
    image = Image.new("L", (math.ceil(right) + 1 - corner[0], math.ceil(bottom) + 1 - corner[1]))
    ImageDraw.Draw(image).text((-corner[0], -corner[1]), line, 255, font, anchor="ls", direction=direction)
    return image, *corner


def _visible(letter: str) -> bool:
    return letter in "\u200c\u200d" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs")


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """[start, end) of what is not broken, spaces left out."""
    start = None
    for place, letter in enumerate(text):
        if letter == " ":
            if start is not None:
                yield start, place
            start = None
        elif start is None:
            start = place
        elif _may_break(text[place - 1], letter):
            yield start, place
            start = place
    if start is not None:
        yield start, len(text)


def _may_break(before: str, after: str) -> bool:
    return (_wide(before) or _wide(after)) and after not in NOT_FIRST and before not in NOT_LAST


def _wide(letter: str) -> bool:
    return unicodedata.east_asian_width(letter) in "WF"


def _fitting(text: str, begin: int, end: int, font: ImageFont.FreeTypeFont, width: float) -> int:
    """Where a piece too long for a line is cut: after as many letters as fit, one at least, before no mark."""
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
