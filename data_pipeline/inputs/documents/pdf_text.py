"""The text of a PDF page, with positions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pypdfium2 as pdfium

from data_pipeline.inputs.documents.page_geometry import PageFrame, Rect
from data_pipeline.inputs.documents.pdf_characters import read_characters
from data_pipeline.inputs.documents.pdf_items import items_in_order, visual_items
from data_pipeline.inputs.documents.reading_order import PageItem
from data_pipeline.inputs.documents.right_to_left import count_letters, is_rtl


@dataclass(frozen=True)
class PageText:
    """The text of a page."""

    items: list[PageItem]
    turned: list[Rect]  # characters at another angle (axis labels, a stamp in the margin); they are not in `items`
    turns: int  # that make the text upright
    characters: int  # number of all characters
    unmapped: int  # number of characters of which the font does not say what they are; they are not in `items`
    outside: int  # number of items outside the visible page; they are not in `items`
    rtl: bool  # most letters are written from right to left; then the text of every item is in visual order


def read_text_items(page: pdfium.PdfPage, frame: PageFrame, *, starts_rtl: bool = False) -> PageText:
    """Return the text of a page.

    Args:
        page: The page.
        frame: Its visible part.
        starts_rtl: The document says that it is read from right to left.
    """
    textpage = page.get_textpage()
    characters, unmapped = read_characters(textpage)
    turns = Counter(c.turns for c in characters if c is not None).most_common(1)[0][0] if any(characters) else 0
    found = "".join({c.text for c in characters if c is not None})
    rtl = False
    if is_rtl(found):
        from_right, from_left = count_letters("".join(c.text for c in characters if c is not None))
        rtl = from_right > from_left
        items, turned = visual_items(characters, textpage, frame, turns, starts_rtl=starts_rtl)
    else:
        items, turned = items_in_order(characters, frame, turns)
    textpage.close()
    visible = Rect(-1, -1, *frame.size(turns))
    inside = [item for item in items if visible.intersection(item.rect).area > 0]
    number = sum(c is not None and c.text != " " for c in characters) + unmapped
    return PageText(inside, turned, turns, number, unmapped, len(items) - len(inside), rtl)
