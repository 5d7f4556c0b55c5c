"""Text in Arabic, Hebrew and other scripts that are written from right to left.

A page shows characters in visual order, a string holds them in logical order: the order in which they are spoken.
Numbers and Latin words within such text run from left to right. The Unicode Bidirectional Algorithm maps logical order
to visual order; here it is inverted, line by line.

    shown:    .42 רפסמ הז        returned: "זה מספר 42."
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from bidi import get_display
from bidi.mirror import MIRRORED

_RTL = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]")
_FORMS = re.compile("[\ufb1d-\ufdff\ufe70-\ufeff]")  # letters as drawn, by position in a word, and ligatures
_MARKS = "\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4"
_MARKS += "\u06e7\u06e8\u06ea-\u06ed\u08d3-\u08e1\u08e3-\u08ff"
_MARKED = re.compile(f"([{_MARKS}]+)([^{_MARKS}])")
_ARABIC_LETTER, _LATIN_LETTER = "\u0627", "a"
_FIRST_OF_HEBREW_CLASS = 0x1E800  # Mende Kikakui: 197 letters
_LAM, _ALEFS = "\u0644", "\u0622\u0623\u0625\u0627\u0671"
_CLOSING = ".,:;!?)]}…"


def is_rtl(text: str) -> bool:
    """Return whether a text contains characters of a script that is written from right to left."""
    return _RTL.search(text) is not None


def count_letters(text: str) -> tuple[int, int]:
    """Return the numbers of letters that are written from right to left, and from left to right."""
    classes = [unicodedata.bidirectional(character) for character in text]
    return sum(each in ("R", "AL") for each in classes), classes.count("L")


def is_mark(character: str) -> bool:
    """Return whether a character is drawn on the letter before it."""
    return unicodedata.category(character) in ("Mn", "Me")


def glyph_text(parts: Sequence[str], marks: str) -> str:
    """Return the characters of one glyph in visual order, each letter with its marks behind it.

    Args:
        parts: Characters by the positions that pdfium gives them within the glyph. It may count from either side.
        marks: Marks that are glyphs of their own.
    """
    order = "".join(parts)
    if not is_rtl(order):
        return order + marks
    if is_mark(order[0]) or (order[0] in _ALEFS and order[-1] == _LAM):
        order = order[::-1]
    letters: list[str] = []
    for character in order:
        if letters and is_mark(character):
            letters[-1] += character
        else:
            letters.append(character)
    letters[-1] += marks
    return "".join(reversed(letters))


def as_shown(characters: Sequence[str], *, starts_rtl: bool) -> list[str]:
    """Return the characters of one line as its glyphs show them.

    pdfium replaces a bracket by its mirror image where it takes the direction for right to left: in its order, a
    neutral character after a letter that is written from right to left.

    Args:
        characters: Characters of one line, as pdfium gives them.
        starts_rtl: The document says that it is read from right to left.
    """
    shown = []
    rtl = starts_rtl
    for character in characters:
        direction = unicodedata.bidirectional(character)
        if direction in ("L", "R", "AL"):
            rtl = direction != "L"
        neutral = direction in ("ON", "S", "WS", "B")
        shown.append(MIRRORED.get(character, character) if rtl and neutral else character)
    return shown


def logical_line(visual: str, *, rtl_page: bool) -> str:
    """Return one line in logical order, with base letters instead of presentation forms.

    Args:
        visual: The characters from left to right; a mark follows its letter.
        rtl_page: Most letters of the page are written from right to left.
    """
    base = _base_direction(visual, rtl_page)
    found = _display(visual, base)
    if is_rtl(visual):
        # What a number means depends on the letters before it. Those of the line before it are not known here.
        candidates = [found, *(_display(letter + visual, base, letter) for letter in (_ARABIC_LETTER, _LATIN_LETTER))]
        candidates.append(_as_hebrew(visual, base))
        found = next((each for each in candidates if _display(each, base) == visual), found)
        found = _MARKED.sub(r"\2\1", found)
    return unicodedata.normalize("NFC", _FORMS.sub(_base_letters, found))


def _base_direction(visual: str, rtl_page: bool) -> str:
    rtl, ltr = count_letters(visual)
    letters = [each for each in map(unicodedata.bidirectional, visual) if each in ("L", "R", "AL")]
    if not rtl:
        return "R" if rtl_page and visual[:1] in _CLOSING else "L"
    if rtl_page:
        return "L" if ltr > 4 * rtl and letters[0] == letters[-1] == "L" else "R"
    return "R" if rtl > ltr else "L"


def _display(text: str, base: str, context: str = "") -> str:
    """Return the text as the Bidirectional Algorithm orders it, without the context that stands before it."""
    shown = get_display(text, base_dir=base)
    assert isinstance(shown, str)
    if base == "R" and context:
        return shown.removesuffix(context)
    return shown.removeprefix(context)


def _as_hebrew(visual: str, base: str) -> str:
    """Return the logical order of a line whose numbers precede the Arabic words that stand to the left of them.

    The algorithm treats numbers after Arabic letters unlike numbers after Hebrew letters: other characters of Hebrew's
    class stand for the Arabic ones while it runs.
    """
    arabic = sorted({each for each in visual if unicodedata.bidirectional(each) == "AL"})
    there = {ord(each): _FIRST_OF_HEBREW_CLASS + number for number, each in enumerate(arabic)}
    shown = get_display(visual.translate(there), base_dir=base)
    assert isinstance(shown, str)
    return shown.translate({stand_in: each for each, stand_in in there.items()})


def _base_letters(match: re.Match[str]) -> str:
    return "" if match[0] == "\ufeff" else unicodedata.normalize("NFKC", match[0]).strip()
