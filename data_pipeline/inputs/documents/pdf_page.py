"""One page of a PDF, read with pdfium: its text with positions, and its figures as images.

A page whose text runs up or down (a sideways table) is turned so that its text is upright.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pypdfium2 as pdfium
from PIL import Image

from data_pipeline.errors import BadSample
from data_pipeline.inputs.documents.page_geometry import PageFrame
from data_pipeline.inputs.documents.pdf_annotations import draw_annotations
from data_pipeline.inputs.documents.pdf_figures import MAX_RENDERED_PIXELS, extract_figures
from data_pipeline.inputs.documents.pdf_text import PageText, read_text_items
from data_pipeline.inputs.documents.reading_order import PageItem

MAX_UNMAPPED = 0.02  # of a page's characters: with more, and more than MAX_UNMAPPED_COUNT, it is rejected
MAX_UNMAPPED_COUNT = 3
UNMAPPED_FONT = "unmapped_font"


@dataclass(frozen=True)
class PageContent:
    """The text and figures of one page."""

    items: list[PageItem]  # in no particular order; a figure holds a Media
    size: tuple[float, float]  # (width, height) in points
    not_read: Mapping[str, int] = field(default_factory=dict)  # what of the page is neither text nor a figure, by name
    problem: BadSample | None = None  # why its text cannot be used


def read_page(
    document: pdfium.PdfDocument, number: int, *, figures: bool, dpi: int, starts_rtl: bool = False
) -> PageContent:
    """Return the text of a page and, if asked for, its figures.

    Args:
        document: The document. Values of form fields and comments are drawn on the page.
        number: The number of the page, from 0.
        figures: Whether to extract figures.
        dpi: Resolution at which drawings are rendered.
        starts_rtl: The document says that it is read from right to left.

    Raises:
        PdfiumError: The page is damaged.
    """
    page, not_read = draw_annotations(document, number)
    rotation = page.get_rotation()
    page.set_rotation(0)  # the text decides what is upright, not the rotation for display
    left, bottom, right, top = page.get_bbox()
    frame = PageFrame(left, top, right - left, top - bottom)
    text = read_text_items(page, frame, starts_rtl=starts_rtl)
    items = text.items
    if figures:
        items, small = extract_figures(page, frame, text.turns, items, text.turned, dpi)
        not_read["image: small_image"] += small
    page.set_rotation(rotation)  # `render_page` shows what a viewer shows
    width, height = frame.size(text.turns)
    if text.rtl:
        items = [replace(item, rect=item.rect.mirrored(width), visual=True, mirrored=True) for item in items]
    shown = [item.rect for item in items if item.figure is not None]
    not_read["text at another angle"] += sum(
        not any(rect.intersection(figure).area > 0 for figure in shown) for rect in text.turned
    )
    not_read["text outside the page"] += text.outside
    not_read["character without Unicode"] += text.unmapped
    return PageContent(items, (width, height), +not_read, _problem(text))


def _problem(text: PageText) -> BadSample | None:
    if text.unmapped <= max(MAX_UNMAPPED_COUNT, MAX_UNMAPPED * text.characters):
        return None
    detail = f"{text.unmapped} of {text.characters} characters: their font does not say which ones they are"
    return BadSample(UNMAPPED_FONT, f"{detail}; run OCR instead")


def render_page(page: pdfium.PdfPage, dpi: int) -> Image.Image:
    """Return the page as a viewer shows it, an RGB image with at most MAX_RENDERED_PIXELS pixels."""
    scale = min(dpi / 72, math.sqrt(MAX_RENDERED_PIXELS / (page.get_width() * page.get_height())))
    return page.render(scale=scale, draw_annots=False).to_pil().convert("RGB")
