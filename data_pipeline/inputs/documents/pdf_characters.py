"""The characters of a PDF page as pdfium reads them, with their positions."""

from __future__ import annotations

import ctypes
import math
import re
from dataclasses import dataclass

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from data_pipeline.inputs.documents.page_geometry import Bounds

_MONOSPACED = re.compile(rb"mono|cour|consol|typewriter|menlo|inconsolata|cmtt|sftt|lmtt|fira.?code", re.IGNORECASE)
_FIXED_PITCH = 1  # bit of a font descriptor's flags: PDF 32000-1, table 123
# Bullets and arrows of Symbol and Wingdings, which have no Unicode in the fonts of office programs -> their characters.
_BULLETS = {
    **{0xF0B7: 0x2022, 0xF0A7: 0x25AA, 0xF06E: 0x25A0, 0xF0A8: 0x25FB, 0xF06F: 0x25A1, 0xF06C: 0x25CF, 0xF0D8: 0x27A2},
    **{0xF0FC: 0x2713, 0xF0FB: 0x2717, 0xF0FE: 0x2611, 0xF076: 0x2756, 0xF0E0: 0x2192, 0xF0E8: 0x2794, 0xF02D: 0x2212},
}
_NO_CHARACTER = re.compile("[\ud800-\uf8ff\ufffd\uffff\U000f0000-\U0010ffff]")  # surrogates, private use, unknown


@dataclass(frozen=True)
class Character:
    """One character of a page."""

    text: str
    bounds: Bounds
    font_size: float  # points
    turns: int  # that make it upright
    monospaced: bool
    index: int  # on the page, in pdfium's order


def read_characters(textpage: pdfium.PdfTextPage) -> tuple[list[Character | None], int]:
    """Return every character in the order of the file, None where a line ends, and the number of unmapped ones."""
    found: list[Character | None] = []
    unmapped = 0
    rect, flags = pdfium_c.FS_RECTF(), ctypes.c_int()
    name = ctypes.create_string_buffer(128)
    fonts: dict[tuple[bytes, int], bool] = {}  # (name, flags) -> whether it is monospaced
    errors: dict[tuple[tuple[bytes, int], int], bool] = {}  # (font, code) -> whether the code is not a character
    raw = textpage.raw
    for index in range(textpage.count_chars()):
        code = pdfium_c.FPDFText_GetUnicode(raw, index)
        if code in (10, 13):
            found.append(None)
            continue
        if code in (9, 32, 0xA0):
            found.append(Character(" ", (0, 0, 0, 0), 0, found[-1].turns if found and found[-1] else 0, False, index))
            continue
        code = _BULLETS.get(code, code)
        if (code < 32 and code != 2) or (code >= 0xD800 and _NO_CHARACTER.match(chr(min(code, 0x10FFFF)))):
            unmapped += 1
            continue
        bounds = _character_bounds(raw, index, rect)
        if bounds is None:
            continue
        pdfium_c.FPDFText_GetFontInfo(raw, index, name, len(name), flags)
        font = (name.value, flags.value)
        if font not in fonts:
            fonts[font] = bool(flags.value & _FIXED_PITCH) or _MONOSPACED.search(name.value) is not None
        if (font, code) not in errors:
            errors[font, code] = pdfium_c.FPDFText_HasUnicodeMapError(raw, index) == 1
        if errors[font, code]:
            unmapped += 1
            continue
        # pdfium counts angles clockwise.
        angle = pdfium_c.FPDFText_GetCharAngle(raw, index)
        turns = -round(angle / (math.pi / 2)) % 4 if angle >= 0 else 0
        size = bounds[2] - bounds[0] if turns % 2 else bounds[3] - bounds[1]
        found.append(Character(chr(code), bounds, size, turns, fonts[font], index))
    return found, unmapped


@dataclass(frozen=True)
class Pen:
    """Where the pen of a character stands, in a PDF's coordinates."""

    x: float
    y: float  # of the baseline
    em: float  # font size in points; 0 if it is not known
    bounds: Bounds  # of the character, or of its part of a glyph with several characters


def pen_of(textpage: pdfium.PdfTextPage, character: Character) -> Pen | None:
    """Return where a character stands."""
    x, y, matrix, rect = ctypes.c_double(), ctypes.c_double(), pdfium_c.FS_MATRIX(), pdfium_c.FS_RECTF()
    if not pdfium_c.FPDFText_GetCharOrigin(textpage, character.index, x, y):
        return None
    em = 0.0
    if pdfium_c.FPDFText_GetMatrix(textpage, character.index, matrix):
        em = pdfium_c.FPDFText_GetFontSize(textpage, character.index) * math.hypot(matrix.c, matrix.d)
    bounds = character.bounds
    if character.text == " ":
        bounds = _character_bounds(textpage.raw, character.index, rect) or bounds
    return Pen(x.value, y.value, em, bounds)


def _character_bounds(textpage: pdfium_c.FPDF_TEXTPAGE, index: int, rect: pdfium_c.FS_RECTF) -> Bounds | None:
    """Return bounds from the font's ascent to its descent, or of the glyph where the font does not define these."""
    if pdfium_c.FPDFText_GetLooseCharBox(textpage, index, rect) and rect.right > rect.left and rect.top > rect.bottom:
        return rect.left, rect.bottom, rect.right, rect.top
    left, right, bottom, top = (ctypes.c_double() for _ in range(4))
    if not pdfium_c.FPDFText_GetCharBox(textpage, index, left, right, bottom, top):
        return None
    return (left.value, bottom.value, right.value, top.value) if right.value > left.value else None
