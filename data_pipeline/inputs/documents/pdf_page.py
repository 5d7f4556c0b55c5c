"""One page of a PDF, read with pdfium: its text with positions, and its figures as images.

A page whose text runs up or down (a sideways table) is turned so that its text is upright.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pypdfium2 as pdfium
from PIL import Image

from data_pipeline.inputs.documents.page_geometry import PageFrame
from data_pipeline.inputs.documents.pdf_figures import MAX_RENDERED_PIXELS, extract_figures
from data_pipeline.inputs.documents.pdf_text import read_text_items
from data_pipeline.inputs.documents.reading_order import PageItem


@dataclass(frozen=True)
class PageContent:
    """The text and figures of one page."""

    items: list[PageItem]  # in no particular order; a figure holds a Media
    size: tuple[float, float]  # (width, height) in points


def read_page(page: pdfium.PdfPage, *, figures: bool, dpi: int) -> PageContent:
    """Return the text of a page and, if asked for, its figures.

    Args:
        page: The page. Its rotation is reset.
        figures: Whether to extract figures.
        dpi: Resolution at which drawings are rendered.

    Raises:
        PdfiumError: The page is damaged.
    """
    page.set_rotation(0)  # the text decides what is upright, not the rotation for display
    left, bottom, right, top = page.get_bbox()
    frame = PageFrame(left, top, right - left, top - bottom)
    items, turned, turns = read_text_items(page, frame)
    if figures:
        items = extract_figures(page, frame, turns, items, turned, dpi)
    return PageContent(items, frame.size(turns))


def render_page(page: pdfium.PdfPage, dpi: int) -> Image.Image:
    """Return the page as an RGB image, with at most MAX_RENDERED_PIXELS pixels."""
    scale = min(dpi / 72, math.sqrt(MAX_RENDERED_PIXELS / (page.get_width() * page.get_height())))
    return page.render(scale=scale, draw_annots=False).to_pil().convert("RGB")
