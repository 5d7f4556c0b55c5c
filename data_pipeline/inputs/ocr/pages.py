"""Images of pages with their text, for the OCR domain.

    python -m tools.shard build --input papers/ --kind pages --out shards/pages --tokenizer TOKENIZER
    python -m tools.shard build --input scans/ --kind page_pairs --out shards/scans --tokenizer TOKENIZER

`pages` renders the pages of PDFs; the target is their text layer in reading order. `page_pairs` reads images with their
markup in a file beside them: page-1.png with page-1.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pypdfium2 as pdfium

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.documents.parts import with_file
from data_pipeline.inputs.documents.pdf import check_dpi, count_pages, open_pdf, read_pages
from data_pipeline.inputs.documents.pdf_figures import encode_image
from data_pipeline.inputs.documents.pdf_page import PageContent, render_page
from data_pipeline.inputs.documents.reading_order import lines_in_order, paragraphs
from data_pipeline.inputs.draft import Draft, NotRead, Rejected, Unit
from data_pipeline.inputs.flow import file_units, image_media, read_document, read_text
from data_pipeline.inputs.names import beside, count_by_suffix, files_below, shown_names
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
        """Return one unit per file, and one for the other files of a folder."""
        units = file_units([file for path in self.paths for file in _pdfs(path)])
        return [*units, *_other_files(self.paths, {unit.path for unit in units})]

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Return one file and its pages."""
        return {"files": unit.stop} if unit.extra else count_pages(unit.path)

    def read(self, unit: Unit) -> Iterator[Draft | Rejected | NotRead]:
        """Yield one sample per page."""
        if unit.extra:
            yield from _not_read(unit)
            return
        origin = _origin(unit.path, self.paths)
        try:
            yield from with_file(self._pages(unit.path, origin))
        except BadSample as error:
            yield Rejected(origin, error.reason, error.detail, self.given(unit))

    def _pages(self, path: str, origin: str) -> Iterator[Draft | Rejected]:
        with open_pdf(path) as document:
            contents = read_pages(document, figures=False, dpi=self.dpi)
            for number, content in enumerate(contents):
                page = self._page(document, number, content, f"{origin}#page={number + 1}")
                yield replace(page, items={"pages": 1})

    def _page(self, document: pdfium.PdfDocument, number: int, content: PageContent, origin: str) -> Draft | Rejected:
        text = "\n\n".join(paragraph.text for paragraph in paragraphs(lines_in_order(content.items)))
        if content.problem is not None:
            return Rejected(origin, content.problem.reason, content.problem.detail)
        if not text:
            return Rejected(origin, "no_text_layer", "the page is blank, or an image without text")
        if len(text) < self.min_characters:
            return Rejected(origin, "short_text", f"{len(text)} characters of text, fewer than {self.min_characters}")
        try:
            image = render_page(document[number], self.dpi)
        except pdfium.PdfiumError as error:
            return Rejected(origin, "unreadable_document", str(error))
        record = {"domain": "ocr", "text": text}
        return Draft(record, [encode_image(image, lossy=False)], origin=origin, not_read=content.not_read)


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
        """Return one unit per image, and one for the other files that are not its markup."""
        units = [unit for path in self.paths for unit in file_units(_images(path))]
        if not units:
            raise DataError(f"{', '.join(self.paths)}: contains no images: give a folder of images with their markup")
        found = {str(markup) for unit in units if (markup := beside(Path(unit.path), self._suffixes)) is not None}
        return [*units, *_other_files(self.paths, found | {unit.path for unit in units})]

    @property
    def _suffixes(self) -> tuple[str, ...]:
        return (self.markup,) if self.markup else MARKUP

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the image and its markup, or the other files."""
        if unit.extra:
            return {"files": unit.stop}
        return {"files": 1 if beside(Path(unit.path), self._suffixes) is None else 2}

    def read(self, unit: Unit) -> Iterator[Draft | Rejected | NotRead]:
        """Yield the sample of an image."""
        if unit.extra:
            yield from _not_read(unit)
            return
        origin, items = _origin(unit.path, self.paths), self.given(unit)
        try:
            markup = beside(Path(unit.path), self._suffixes)
            if markup is None:
                raise BadSample("no_markup", f"no file of this name ends in {' or '.join(self._suffixes)}")
            text = read_text(str(markup)).strip()
            if not text:
                raise BadSample("empty_document", f"{markup.name} is empty")
            record = {"domain": "ocr", "text": text, "markup": markup.suffix[1:].lower()}
            yield Draft(record, [image_media(read_document(unit.path))], origin=origin, items=items)
        except BadSample as error:
            yield Rejected(origin, error.reason, error.detail, items)


def _origin(file: str, paths: Sequence[str]) -> str:
    """Return the name of a file for reports, from the path that was given for it or for a folder above it."""
    return next(
        f"{shown}/{Path(file).relative_to(path).as_posix()}".removesuffix("/.")
        for path, shown in shown_names(paths).items()
        if Path(file).is_relative_to(path)
    )


def _pdfs(path: str) -> list[str]:
    """Return a file, or the PDFs in a folder."""
    if not os.path.isdir(path):
        return [path]
    found = sorted(str(file) for file in files_below(Path(path)) if file.suffix.lower() == ".pdf")
    if not found:
        raise DataError(f"{path}: contains no PDFs: give a PDF, or a folder of them")
    return found


def _other_files(paths: Sequence[str], read: set[str]) -> list[Unit]:
    """Return one unit for the files of folders that are not read, if there are any. `stop` is their number."""
    folders = [path for path in paths if os.path.isdir(path)]
    others = count_by_suffix(file for folder in folders for file in files_below(Path(folder)) if str(file) not in read)
    return [Unit(folders[0], stop=sum(others.values()), extra=others)] if others else []


def _not_read(unit: Unit) -> Iterator[NotRead]:
    for name, count in unit.extra.items():
        yield NotRead(name, count, {"files": count})


def _images(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: give a folder of images with their markup beside them")
    return sorted(str(file) for file in files_below(Path(folder)) if file.suffix[1:].lower() in IMAGE_EXTENSIONS)
