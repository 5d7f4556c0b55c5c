"""Images of pages with their text, for the OCR domain.

    python -m tools.shard build --input paper.pdf --kind pages --out shards/pages --tokenizer TOKENIZER
    python -m tools.shard build --input scans/ --kind page_pairs --out shards/scans --tokenizer TOKENIZER

`pages` renders the pages of PDFs; the target is their text layer in reading order. `page_pairs` reads images with their
markup in a file beside them: page-1.png with page-1.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pypdfium2 as pdfium

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.documents.pdf import check_dpi, open_pdf, read_pages
from data_pipeline.inputs.documents.pdf_figures import encode_image
from data_pipeline.inputs.documents.pdf_page import PageContent, render_page
from data_pipeline.inputs.documents.reading_order import lines_in_order, paragraphs
from data_pipeline.inputs.draft import ONE_FILE, Draft, Rejected, Unit, credited
from data_pipeline.inputs.flow import file_units, image_media, read_document, read_text
from data_pipeline.inputs.names import beside, files_below, shown_names
from data_pipeline.shards.members import IMAGE_EXTENSIONS

MARKUP = (".md", ".mmd", ".tex", ".html", ".txt")  # the first one that exists is used


@dataclass(frozen=True)
class PdfPages:
    """Pages of PDFs as images with their text, without running heads and page numbers."""

    paths: tuple[str, ...]
    dpi: int = 144  # resolution at which pages are rendered
    min_characters: int = 100  # pages with less text (empty ones, full-page figures) are rejected

    def __post_init__(self) -> None:
        """Check the options."""
        check_dpi(self.dpi)

    def units(self) -> Sequence[Unit]:
        """Return one unit per file."""
        return file_units(self.paths)

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Return one file."""
        return ONE_FILE

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        """Yield one sample per page."""
        return credited(self._read(unit), ONE_FILE)

    def _read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        origin = shown_names(self.paths)[unit.path]
        try:
            with open_pdf(unit.path) as document:
                contents = read_pages(document, figures=False, dpi=self.dpi)
                for number, content in enumerate(contents):
                    yield self._page(document, number, content, f"{origin}#page={number + 1}")
        except BadSample as error:
            yield Rejected(origin, error.reason, error.detail)

    def _page(self, document: pdfium.PdfDocument, number: int, content: PageContent, origin: str) -> Draft | Rejected:
        text = "\n\n".join(paragraph.text for paragraph in paragraphs(lines_in_order(content.items)))
        if not text:
            return Rejected(origin, "no_text_layer", "the page is an image without text")
        if len(text) < self.min_characters:
            return Rejected(origin, "short_text", f"{len(text)} characters of text, fewer than {self.min_characters}")
        try:
            image = render_page(document[number], self.dpi)
        except pdfium.PdfiumError as error:
            return Rejected(origin, "unreadable_document", str(error))
        return Draft({"domain": "ocr", "text": text}, [encode_image(image, lossy=False)], origin=origin)


@dataclass(frozen=True)
class PagePairs:
    """Folders of images, each with its markup in a file beside it."""

    paths: tuple[str, ...]
    markup: str = ""  # suffix of the markup files; empty: the first of MARKUP that exists

    def __post_init__(self) -> None:
        """Check the options."""
        if self.markup and not self.markup.startswith("."):
            raise DataError(f"--set markup={self.markup}: give a suffix with its dot, such as {MARKUP[0]}")

    def units(self) -> Sequence[Unit]:
        """Return one unit per image."""
        units = [unit for path in self.paths for unit in file_units(_images(path))]
        if not units:
            raise DataError(f"{', '.join(self.paths)}: contains no images")
        return units

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Return one file."""
        return ONE_FILE

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        """Yield the sample of an image."""
        origin = next(
            f"{shown}/{Path(unit.path).relative_to(path).as_posix()}"
            for path, shown in shown_names(self.paths).items()
            if Path(unit.path).is_relative_to(path)
        )
        suffixes = (self.markup,) if self.markup else MARKUP
        try:
            markup = beside(Path(unit.path), suffixes)
            if markup is None:
                raise BadSample("no_markup", f"no file of this name ends in {' or '.join(suffixes)}")
            text = read_text(str(markup)).strip()
            if not text:
                raise BadSample("empty_document", f"{markup.name} is empty")
            record = {"domain": "ocr", "text": text, "markup": markup.suffix[1:].lower()}
            yield Draft(record, [image_media(read_document(unit.path))], origin=origin, items=ONE_FILE)
        except BadSample as error:
            yield Rejected(origin, error.reason, error.detail, ONE_FILE)


def _images(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: give a folder of images with their markup beside them")
    return sorted(str(file) for file in files_below(Path(folder)) if file.suffix[1:].lower() in IMAGE_EXTENSIONS)
