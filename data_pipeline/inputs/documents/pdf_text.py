"""The text of a PDF page, with positions."""

from __future__ import annotations

import ctypes
import math
import re
from collections import Counter
from dataclasses import dataclass, replace

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from data_pipeline.inputs.documents.page_geometry import Bounds, PageFrame, Rect
from data_pipeline.inputs.documents.reading_order import SPLIT_GAP, PageItem

_MONOSPACED = re.compile(rb"mono|cour|consol|typewriter|menlo|inconsolata|cmtt|sftt|lmtt|fira.?code", re.IGNORECASE)
_FIXED_PITCH = 1  # bit of a font descriptor's flags: PDF 32000-1, table 123
_REPLACEMENTS = {
    **dict(zip("ﬀﬁﬂﬃﬄﬅﬆ", ("ff", "fi", "fl", "ffi", "ffl", "st", "st"), strict=True)),
    "\u00a0": " ",
    "\x02": "-",  # pdfium's marks of a hyphen at the end of a line
    "\ufffe": "-",
}


@dataclass(frozen=True)
class _Character:
    """One character of a page."""

    text: str
    bounds: Bounds
    font_size: float  # points
    turns: int  # that make it upright
    monospaced: bool


def read_text_items(page: pdfium.PdfPage, frame: PageFrame) -> tuple[list[PageItem], list[Rect], int]:
    """Return the text of a page.

    Returns:
        The text, the rectangles of characters at another angle (axis labels, a stamp in the margin), which are not part
        of the text, and the turns that make the text upright.
    """
    textpage = page.get_textpage()
    characters = _characters(textpage)
    textpage.close()
    turns = Counter(c.turns for c in characters if c is not None).most_common(1)[0][0] if any(characters) else 0
    items: list[PageItem] = []
    turned: list[Rect] = []
    ended = True  # whether the next character begins an item
    spaced = False
    for character in characters:
        if character is None:
            ended = True
        elif character.text == " ":
            spaced = True
        elif character.turns != turns:
            turned.append(frame.rect(character.bounds, turns))
        else:
            rect = frame.rect(character.bounds, turns)
            text = _REPLACEMENTS.get(character.text, character.text)
            if not ended and _follows(items[-1], rect, character):
                last = items.pop()
                size = max(last.font_size, character.font_size)  # letters of a ligature report their glyph's size only
                text = last.text + " " * spaced + text
                items.append(replace(last, rect=last.rect.union(rect), text=text, font_size=size))
            else:
                items.append(PageItem(rect, text, character.font_size, character.monospaced))
            ended = spaced = False
    visible = Rect(-1, -1, *frame.size(turns))
    return [item for item in items if visible.intersection(item.rect).area > 0], turned, turns


def _follows(item: PageItem, rect: Rect, character: _Character) -> bool:
    """Return whether a character is in the same line as the item before it, at most a wide space away."""
    em = max(item.font_size, character.font_size)
    gap = rect.left - item.rect.right
    return rect.beside(item.rect) and -0.5 * em < gap < SPLIT_GAP * em and character.monospaced == item.monospaced


def _characters(textpage: pdfium.PdfTextPage) -> list[_Character | None]:
    """Return every character in the order of the file, and None where a line ends."""
    found: list[_Character | None] = []
    rect, flags = pdfium_c.FS_RECTF(), ctypes.c_int()
    name = ctypes.create_string_buffer(128)
    fonts: dict[tuple[bytes, int], bool] = {}  # (name, flags) -> whether it is monospaced
    raw = textpage.raw
    for index in range(textpage.count_chars()):
        code = pdfium_c.FPDFText_GetUnicode(raw, index)
        if code in (10, 13):
            found.append(None)
            continue
        if code in (9, 32, 0xA0):
            found.append(_Character(" ", (0, 0, 0, 0), 0, found[-1].turns if found and found[-1] else 0, False))
            continue
        if (code < 32 and code != 2) or 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            continue
        bounds = _character_bounds(raw, index, rect)
        if bounds is None:
            continue
        pdfium_c.FPDFText_GetFontInfo(raw, index, name, len(name), flags)
        font = (name.value, flags.value)
        if font not in fonts:
            fonts[font] = bool(flags.value & _FIXED_PITCH) or _MONOSPACED.search(name.value) is not None
        # pdfium counts angles clockwise.
        angle = pdfium_c.FPDFText_GetCharAngle(raw, index)
        turns = -round(angle / (math.pi / 2)) % 4 if angle >= 0 else 0
        size = bounds[2] - bounds[0] if turns % 2 else bounds[3] - bounds[1]
        found.append(_Character(chr(code), bounds, size, turns, fonts[font]))
    return found


def _character_bounds(textpage: pdfium_c.FPDF_TEXTPAGE, index: int, rect: pdfium_c.FS_RECTF) -> Bounds | None:
    """Return bounds from the font's ascent to its descent, or of the glyph where the font does not define these."""
    if pdfium_c.FPDFText_GetLooseCharBox(textpage, index, rect) and rect.right > rect.left and rect.top > rect.bottom:
        return rect.left, rect.bottom, rect.right, rect.top
    left, right, bottom, top = (ctypes.c_double() for _ in range(4))
    if not pdfium_c.FPDFText_GetCharBox(textpage, index, left, right, bottom, top):
        return None
    return (left.value, bottom.value, right.value, top.value) if right.value > left.value else None
