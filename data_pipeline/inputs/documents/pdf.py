"""PDF documents as interleaved samples: text in reading order, with the figures at their positions.

python -m tools.shard build --input paper.pdf --out shards/paper --tokenizer TOKENIZER
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.documents.parts import with_file
from data_pipeline.inputs.documents.pdf_page import PageContent, read_page
from data_pipeline.inputs.documents.reading_order import PageItem, lines_in_order, paragraphs
from data_pipeline.inputs.draft import ONE_FILE, Draft, Media, NotRead, Rejected, Unit
from data_pipeline.inputs.flow import Block, file_units, flow_draft, read_document
from data_pipeline.inputs.names import shown_names

MARGIN = 0.12  # of the page height: headers, footers and page numbers are within this distance of an edge
_FAILURES = {
    pdfium_c.FPDF_ERR_PASSWORD: ("encrypted", "it asks for a password: save it without one"),
    pdfium_c.FPDF_ERR_SECURITY: ("encrypted", "its encryption is not supported: save it without encryption"),
}


@dataclass(frozen=True)
class PdfDocuments:
    """Academic papers, manuals and books."""

    paths: tuple[str, ...]
    pages_per_sample: int = 0  # 0: one sample per document
    figures: bool = True  # extract figures as images; false: text only
    dpi: int = 144  # resolution at which drawings are rendered

    def __post_init__(self) -> None:
        """Check the options."""
        if self.pages_per_sample < 0:
            raise DataError(
                f"--set pages_per_sample={self.pages_per_sample}: give a number of pages, or 0 for all of them"
            )
        check_dpi(self.dpi)

    def units(self) -> Sequence[Unit]:
        """Return one unit per file."""
        return file_units(self.paths)

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Return one file and its pages."""
        return count_pages(unit.path)

    def read(self, unit: Unit) -> Iterator[Draft | Rejected | NotRead]:
        """Yield the samples of a document. Pages whose text cannot be used are rejected alone."""
        origin = shown_names(self.paths)[unit.path]
        try:
            with open_pdf(unit.path) as document:
                contents = read_pages(document, figures=self.figures, dpi=self.dpi)
            if not any(item.text for page in contents if page.problem is None for item in page.items):
                raise next(
                    (page.problem for page in contents if page.problem is not None),
                    BadSample("no_text_layer", "its pages are images without text: run OCR, then use --kind pages"),
                )
        except BadSample as error:
            yield Rejected(origin, error.reason, error.detail, self.given(unit))
            return
        yield from with_file(self._samples(contents, origin))

    def _samples(self, contents: Sequence[PageContent], origin: str) -> Iterator[Draft | Rejected | NotRead]:
        for number, content in enumerate(contents, start=1):
            if content.problem is not None:
                yield Rejected(f"{origin}#page={number}", content.problem.reason, content.problem.detail, {"pages": 1})
        for first, last in self._ranges(contents):
            name = origin if (first, last) == (0, len(contents)) else f"{origin}#page={first + 1}"
            pages = contents[first:last]
            blocks = _blocks([lines_in_order(page.items) for page in pages])
            not_read = sum((Counter(page.not_read) for page in pages), Counter[str]())
            if any(blocks):
                not_read["blank page"] += sum(not page.items for page in pages)
                draft = flow_draft(blocks, name, pages=[first + 1, last])
                yield replace(draft, items={"pages": last - first}, not_read=dict(+not_read))
            else:
                yield NotRead("blank page", last - first, {"pages": last - first})
                yield from (NotRead(name, count) for name, count in sorted(not_read.items()))

    def _ranges(self, contents: Sequence[PageContent]) -> Iterator[tuple[int, int]]:
        """Yield the first page of each sample and the one after its last. A rejected page divides samples."""
        step = self.pages_per_sample or len(contents)
        for first in range(0, len(contents), step):
            start = first
            for number in range(first, min(first + step, len(contents))):
                if contents[number].problem is not None:
                    if start < number:
                        yield start, number
                    start = number + 1
            if start < (end := min(first + step, len(contents))):
                yield start, end


def count_pages(path: str) -> Mapping[str, int]:
    """Return one file and its number of pages; the file alone if it cannot be opened."""
    try:
        with open_pdf(path) as document:
            return {**ONE_FILE, "pages": len(document)}
    except BadSample:
        return ONE_FILE


def open_pdf(path: str) -> pdfium.PdfDocument:
    """Open a PDF.

    Raises:
        BadSample: encrypted, unreadable_document, missing_file or empty_document.
    """
    try:
        document = pdfium.PdfDocument(read_document(path))
    except pdfium.PdfiumError as error:
        reason = ("unreadable_document", f"not a PDF, or a damaged one: {error}")
        raise BadSample(*_FAILURES.get(getattr(error, "err_code", None), reason)) from error
    if not len(document):
        raise BadSample("empty_document", "it has no pages")
    return document


def read_pages(document: pdfium.PdfDocument, *, figures: bool, dpi: int) -> list[PageContent]:
    """Return the content of every page, without running heads.

    Raises:
        BadSample: unreadable_document, if pdfium cannot read a page.
    """
    pages = []
    starts_rtl = _is_read_from_right(document)
    for number in range(len(document)):
        try:
            pages.append(read_page(document, number, figures=figures, dpi=dpi, starts_rtl=starts_rtl))
        except pdfium.PdfiumError as error:
            raise BadSample("unreadable_document", f"page {number + 1}: {error}") from error
    return without_running_heads(pages)


def _is_read_from_right(document: pdfium.PdfDocument) -> bool:
    """Return whether a document asks its viewer for an order from right to left."""
    name = ctypes.create_string_buffer(8)
    pdfium_c.FPDF_VIEWERREF_GetName(document, b"Direction", name, len(name))
    return name.value == b"R2L"


def without_running_heads(pages: Sequence[PageContent]) -> list[PageContent]:
    """Return the pages without running heads, footers and page numbers.

    These are texts in the upper or lower margin that repeat at the same height, apart from their numbers, on three
    pages or more, or on both of two pages.
    """

    def mark(item: PageItem, page: PageContent) -> tuple[str, int] | None:
        if item.figure is not None or MARGIN < item.rect.middle / page.size[1] < 1 - MARGIN:
            return None
        return re.sub(r"\d+|^[ivxlc]+$", "#", item.text.strip().lower()), round(item.rect.middle / 4)

    counts = Counter(each for page in pages for each in {mark(item, page) for item in page.items} if each is not None)
    running = {each for each, count in counts.items() if count >= min(3, max(2, len(pages)))}
    found = []
    for page in pages:
        items = [item for item in page.items if mark(item, page) not in running]
        heads = {"running head": len(page.items) - len(items)} if len(items) < len(page.items) else {}
        found.append(replace(page, items=items, not_read={**page.not_read, **heads}))
    return found


def _blocks(pages: Sequence[list[PageItem]]) -> list[Block]:
    """Return paragraphs and figures of consecutive pages. A paragraph may continue on the next page."""
    lines: list[PageItem] = []
    columns = 0
    for page in pages:
        numbered = [replace(line, column=columns + line.column) for line in page]
        columns = max((line.column + 1 for line in numbered), default=columns)
        lines += numbered
    return [item.figure if isinstance(item.figure, Media) else item.text for item in paragraphs(lines)]


def check_dpi(dpi: int) -> None:
    """Raise DataError unless the resolution is between 36 and 600."""
    if not 36 <= dpi <= 600:
        raise DataError(f"--set dpi={dpi}: give 36 to 600")
