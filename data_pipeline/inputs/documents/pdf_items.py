"""Characters of a PDF page as items of text: what stands in one line without a wide gap.

The order of characters that are written from left to right is that of the file. Lines with words that are written from
right to left are put together by the positions of their glyphs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import pypdfium2 as pdfium

from data_pipeline.inputs.documents.page_geometry import PageFrame, Rect
from data_pipeline.inputs.documents.pdf_characters import Character, pen_of
from data_pipeline.inputs.documents.reading_order import SPLIT_GAP, WORD_GAP, PageItem
from data_pipeline.inputs.documents.right_to_left import as_shown, glyph_text, is_mark, is_rtl

_REPLACEMENTS = {
    **dict(zip("ﬀﬁﬂﬃﬄﬅﬆ", ("ff", "fi", "fl", "ffi", "ffl", "st", "st"), strict=True)),
    "\u00a0": " ",
    "\x02": "-",  # pdfium's marks of a hyphen at the end of a line
    "\ufffe": "-",
}


def items_in_order(
    characters: Sequence[Character | None], frame: PageFrame, turns: int
) -> tuple[list[PageItem], list[Rect]]:
    """Return text that is written from left to right, and the rectangles of characters at another angle."""
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
    return items, turned


def _follows(item: PageItem, rect: Rect, character: Character) -> bool:
    """Return whether a character is in the same line as the item before it, at most a wide space away."""
    em = max(item.font_size, character.font_size)
    gap = rect.left - item.rect.right
    return rect.beside(item.rect) and -0.5 * em < gap < SPLIT_GAP * em and character.monospaced == item.monospaced


_NARROW = "اأإآٱلוין"  # letters of about a third of an em


@dataclass
class _Glyph:
    """A drawn shape with its characters: one, or those of a ligature, or a letter with its marks."""

    rect: Rect
    pen: tuple[float, float]  # x, and the baseline
    em: float
    characters: list[tuple[float, str]]  # x of each
    monospaced: bool
    marks: str = ""  # that are drawn on it as glyphs of their own


def visual_items(
    characters: Sequence[Character | None],
    textpage: pdfium.PdfTextPage,
    frame: PageFrame,
    turns: int,
    *,
    starts_rtl: bool,
) -> tuple[list[PageItem], list[Rect]]:
    """Return the text of a page with words from right to left, and the rectangles of characters at another angle.

    pdfium gives the characters of such lines in an order that is neither visual nor logical.
    """
    items: list[PageItem] = []
    turned: list[Rect] = []
    glyphs: dict[tuple[float, float], _Glyph] = {}
    for line in _lines(characters):
        if not any(is_rtl(character.text) for character in line):
            found, others = items_in_order(line, frame, turns)
            items += found
            turned += others
            continue
        shown = as_shown([character.text for character in line], starts_rtl=starts_rtl)
        for character, text in zip(line, shown, strict=True):
            if character.turns != turns:
                turned.append(frame.rect(character.bounds, turns))
            else:
                _add_glyph(glyphs, character, _REPLACEMENTS.get(text, text), textpage, frame, turns)
    return items + _placed(list(glyphs.values())), turned


def _lines(characters: Sequence[Character | None]) -> Iterator[list[Character]]:
    """Yield the characters between the ends of lines."""
    line: list[Character] = []
    for character in (*characters, None):
        if character is not None:
            line.append(character)
        elif line:
            yield line
            line = []


def _add_glyph(
    glyphs: dict[tuple[float, float], _Glyph],
    character: Character,
    text: str,
    textpage: pdfium.PdfTextPage,
    frame: PageFrame,
    turns: int,
) -> None:
    """Add a character to its glyph. The characters of one glyph have one pen position."""
    pen = pen_of(textpage, character)
    if pen is None:
        return
    corner = frame.rect((pen.x, pen.y, pen.x, pen.y), turns)
    rect = frame.rect(pen.bounds, turns)
    if text == " " and rect.width <= 0:
        return  # pdfium's own spaces have no width: a gap is one
    em = pen.em or rect.height
    rect = Rect(min(rect.left, corner.left), corner.top - 0.8 * em, rect.right, corner.top + 0.2 * em)
    key = (round(corner.left, 2), round(corner.top, 2))
    if (glyph := glyphs.get(key)) is None:
        glyphs[key] = _Glyph(rect, (corner.left, corner.top), em, [(pen.bounds[0], text)], character.monospaced)
    else:
        glyph.rect = glyph.rect.union(rect)
        glyph.characters.append((pen.bounds[0], text))


def _glyph_rows(glyphs: Sequence[_Glyph]) -> list[list[_Glyph]]:
    """Return glyphs by baseline, without marks that are glyphs of their own. They are moved to the baseline."""
    plain = [glyph for glyph in glyphs if not any(is_mark(text) for _, text in glyph.characters)]
    marked = [glyph for glyph in glyphs if any(is_mark(text) for _, text in glyph.characters)]
    rows: list[list[_Glyph]] = []
    for glyph in sorted(plain, key=lambda glyph: glyph.pen[1]):
        if rows and glyph.pen[1] - rows[-1][0].pen[1] < 0.35 * glyph.em:
            rows[-1].append(glyph)
        else:
            rows.append([glyph])
    baselines = [median(glyph.pen[1] for glyph in row) for row in rows]
    # A letter with marks in one glyph stands where its mark does, above or below the baseline.
    for glyph in marked:
        if all(is_mark(text) for _, text in glyph.characters):
            continue
        nearest = min(range(len(rows)), key=lambda row: abs(baselines[row] - glyph.pen[1]), default=-1)
        if nearest >= 0 and abs(baselines[nearest] - glyph.pen[1]) < glyph.em:
            rows[nearest].append(glyph)
        else:
            rows.append([glyph])
            baselines.append(glyph.pen[1])
    for row, baseline in zip(rows, baselines, strict=True):
        for glyph in row:
            shift = baseline - glyph.pen[1]
            right = glyph.rect.right
            if len(glyph.characters) > 1 and any(is_mark(text) for _, text in glyph.characters):
                wide = not any(text in _NARROW for _, text in glyph.characters)
                right = max(right, glyph.pen[0] + (0.75 if wide else 0.35) * glyph.em)  # pdfium gives the mark's width
            glyph.rect = Rect(glyph.rect.left, glyph.rect.top + shift, right, glyph.rect.bottom + shift)
            glyph.pen = (glyph.pen[0], baseline)
    return rows


def _placed(glyphs: Sequence[_Glyph]) -> list[PageItem]:
    """Return the items of glyphs, each in visual order."""
    rows = _glyph_rows(glyphs)
    letters = [glyph for row in rows for glyph in row if glyph.characters[0][1] != " "]
    near: dict[int, list[_Glyph]] = defaultdict(list)  # by height, in steps of 20 points
    for glyph in letters:
        near[round(glyph.pen[1] / 20)].append(glyph)
    for mark in glyphs:
        if all(is_mark(text) for _, text in mark.characters):
            step = round(mark.pen[1] / 20)
            _attach(mark, [glyph for each in (step - 1, step, step + 1) for glyph in near[each]])
    return [item for row in rows for item in _items_of_row(row)]


def _attach(mark: _Glyph, letters: Sequence[_Glyph]) -> None:
    """Add a mark to the letter that it is drawn on."""
    left = min(x for x, _ in mark.characters)
    middle = (left + mark.rect.right) / 2

    def distance(glyph: _Glyph) -> tuple[float, float]:
        beside = max(glyph.rect.left - middle, middle - glyph.rect.right, 0.0)
        return beside + abs(glyph.pen[1] - mark.pen[1]), abs(glyph.rect.left + glyph.rect.right - 2 * middle)

    if letters:
        min(letters, key=distance).marks += "".join(text for _, text in mark.characters)


def _items_of_row(row: list[_Glyph]) -> list[PageItem]:
    """Return the glyphs on one baseline as items, divided at wide gaps."""
    items: list[PageItem] = []
    spaced = False
    for glyph in sorted(row, key=lambda glyph: glyph.pen[0]):
        if glyph.characters[0][1] == " ":
            spaced = True
            continue
        text = glyph_text([text for _, text in sorted(glyph.characters, key=lambda each: each[0])], glyph.marks)
        gap = glyph.rect.left - items[-1].rect.right if items else 0.0
        if items and gap < SPLIT_GAP * glyph.em:
            last = items.pop()
            text = last.text + " " * (spaced or gap > WORD_GAP * glyph.em) + text
            items.append(replace(last, rect=last.rect.union(glyph.rect), text=text))
        else:
            items.append(PageItem(glyph.rect, text, glyph.em, glyph.monospaced, visual=True))
        spaced = False
    return items
