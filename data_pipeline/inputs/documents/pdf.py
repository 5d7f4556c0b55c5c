"""PDF documents as interleaved samples: text in reading order, figures where they stand.

python -m tools.shard build --input paper.pdf --out shards/paper --tokenizer TOKENIZER
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.documents.pdf_page import PageContent, read_page
from data_pipeline.inputs.documents.reading_order import Piece, lines_in_order, paragraphs
from data_pipeline.inputs.draft import Draft, Media, Rejected, Unit
from data_pipeline.inputs.flow import Block, file_units, flow_draft, read_document
from data_pipeline.inputs.names import shown_names

MARGIN = 0.12  # of a page's height: where heads, feet and page numbers stand
_FAILURES = {
    pdfium_c.FPDF_ERR_PASSWORD: ("encrypted", "it asks for a password: store it without one"),
    pdfium_c.FPDF_ERR_SECURITY: ("encrypted", "its encryption is not known here: store it without"),
}


@dataclass(frozen=True)
class PdfDocuments:
    """Academic papers, manuals, books.

    pages_per_sample: so many pages make a sample; 0: the whole document is one.
    figures: whether figures are taken out as pictures; without, the text alone. dpi: at which drawings are rendered.
    """

    paths: tuple[str, ...]
    pages_per_sample: int = 0
    figures: bool = True
    dpi: int = 144

    def __post_init__(self) -> None:
        if self.pages_per_sample < 0:
            raise DataError(f"pages_per_sample {self.pages_per_sample}: give a number of pages, or 0 for all of them")
        check_dpi(self.dpi)

    def units(self) -> Sequence[Unit]:
        return file_units(self.paths)

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        origin = shown_names(self.paths)[unit.path]
        try:
            with open_pdf(unit.path) as document:
                contents = read_pages(document, figures=self.figures, dpi=self.dpi)
        except BadSample as error:
            yield Rejected(origin, error.reason, error.detail)
            return
        if not any(piece.text for page in contents for piece in page.pieces):
            yield Rejected(origin, "no_text_layer", "its pages are pictures: read it with `--kind pages` after OCR")
            return
        pages = [lines_in_order(page.pieces) for page in contents]
        step = self.pages_per_sample or len(pages)
        for first in range(0, len(pages), step):
            last = min(first + step, len(pages))
            place = origin if step >= len(pages) else f"{origin}#page={first + 1}"
            blocks = _blocks(pages[first:last])
            if any(blocks):
                yield flow_draft(blocks, place, pages=[first + 1, last])


def open_pdf(path: str) -> pdfium.PdfDocument:
    """Raises BadSample: encrypted, unreadable_document, missing_file, empty_document."""
    try:
        document = pdfium.PdfDocument(read_document(path))
    except pdfium.PdfiumError as error:
        reason = ("unreadable_document", f"not a PDF, or a damaged one: {error}")
        raise BadSample(*_FAILURES.get(getattr(error, "err_code", None), reason)) from error
    if not len(document):
        raise BadSample("empty_document", "it has no pages")
    return document


def read_pages(document: pdfium.PdfDocument, *, figures: bool, dpi: int) -> list[PageContent]:
    """What stands on every page, running heads left out. Raises BadSample `unreadable_document`."""
    pages = []
    for number in range(len(document)):
        try:
            pages.append(read_page(document[number], figures=figures, dpi=dpi))
        except pdfium.PdfiumError as error:
            raise BadSample("unreadable_document", f"page {number + 1}: {error}") from error
    return without_running_heads(pages)


def without_running_heads(pages: Sequence[PageContent]) -> list[PageContent]:
    """Without what comes again page after page at the same height of the upper or lower margin, whatever its numbers:
    running heads, feet and page numbers. It must stand on three pages, or on both of two."""

    def mark(piece: Piece, page: PageContent) -> tuple[str, int] | None:
        if piece.figure is not None or MARGIN < piece.box.middle / page.size[1] < 1 - MARGIN:
            return None
        return re.sub(r"\d+|^[ivxlc]+$", "#", piece.text.strip().lower()), round(piece.box.middle / 4)

    counts = Counter(
        each for page in pages for each in {mark(piece, page) for piece in page.pieces} if each is not None
    )
    running = {each for each, count in counts.items() if count >= min(3, max(2, len(pages)))}
    return [replace(page, pieces=[p for p in page.pieces if mark(p, page) not in running]) for page in pages]


def _blocks(pages: Sequence[list[Piece]]) -> list[Block]:
    """Paragraphs and figures of consecutive pages; a paragraph may go on over a page's end."""
    lines: list[Piece] = []
    columns = 0
    for page in pages:
        lines += [replace(line, column=columns + line.column) for line in page]
        columns = max((line.column + 1 for line in lines), default=0)
    return [piece.figure if isinstance(piece.figure, Media) else piece.text for piece in paragraphs(lines)]


def check_dpi(dpi: int) -> None:
    if not 36 <= dpi <= 600:
        raise DataError(f"dpi {dpi}: give 36 to 600")
