"""PDFs whose text is not all in their text layer: fonts without Unicode, form fields, annotations, blank pages."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pypdfium2 as pdfium
import pytest
from PIL import Image

from data_pipeline.inputs.draft import Draft, Media, NotRead
from tests.data_pipeline.chromium import print_to_pdf
from tests.data_pipeline.inputs.reading import check_accounts, opened, read

LINE = "A line of words that is long enough to be the text of a page, and that all of its readers understand."


def pdf_of(path: Path, objects: list[str]) -> Path:
    """Write a PDF of these objects, numbered from 1; the first is the catalogue. The reader adds its table."""
    body = "".join(f"{number} 0 obj\n{content}\nendobj\n" for number, content in enumerate(objects, start=1))
    path.write_bytes(f"%PDF-1.7\n{body}trailer\n<< /Root 1 0 R >>\n%%EOF\n".encode("latin-1"))
    return path


def stream(content: str, entries: str = "") -> str:
    return f"<< {entries} /Length {len(content)} >>\nstream\n{content}\nendstream"


FONT = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
FORM = "/Type /XObject /Subtype /Form /BBox [0 0 200 20] /Resources << /Font << /F 4 0 R >> >>"


def page_with(path: Path, annotations: str, *objects: str) -> Path:
    """Write one page with LINE and annotations. The further objects have the numbers from 6."""
    page = (
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F 4 0 R >> >> /Contents 5 0 R "
        f"/Annots [{annotations}] >>"
    )
    catalogue = "<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [6 0 R] >> >>"
    pages = "<< /Type /Pages /Kids [3 0 R] /Count 1 >>"
    words = stream(f"BT /F 11 Tf 50 700 Td ({LINE}) Tj ET")
    return pdf_of(path, [catalogue, pages, page, FONT, words, *objects])


def test_values_of_form_fields_and_free_text_are_read_and_drawn(tmp_path):
    field = (
        "<< /Type /Annot /Subtype /Widget /FT /Tx /T (name) /V (Ada Lovelace) /F 4 /Rect [50 600 250 620] "
        "/AP << /N 7 0 R >> >>"
    )
    value = stream("BT /F 12 Tf 2 5 Td (Ada Lovelace) Tj ET", FORM)
    comment = (
        "<< /Type /Annot /Subtype /FreeText /F 4 /Rect [50 500 250 520] /AP << /N 9 0 R >> /Contents (Approved) >>"
    )
    approved = stream("BT /F 12 Tf 2 5 Td (Approved) Tj ET", FORM)
    path = page_with(tmp_path / "form.pdf", "6 0 R 8 0 R", field, value, comment, approved)
    [document], _ = read(opened(path))
    assert document.record["text"].split("\n\n") == [LINE, "Ada Lovelace", "Approved"]
    assert not document.not_read
    [page], _ = read(opened(path, kind="pages"))
    assert page.record["text"] == document.record["text"]
    [media] = page.images
    shown = Image.open(io.BytesIO(media.data)).convert("L")
    scale = shown.width / 612
    assert min(shown.crop((50 * scale, 172 * scale, 250 * scale, 192 * scale)).getdata()) < 100


def test_annotations_that_are_not_read_are_named(tmp_path):
    field = "<< /Type /Annot /Subtype /Widget /FT /Tx /T (name) /V (Ada) /F 4 /Rect [50 600 250 620] >>"
    note = "<< /Type /Annot /Subtype /Text /Rect [50 500 70 520] /Contents (Why?) >>"
    link = "<< /Type /Annot /Subtype /Link /Rect [50 400 70 420] >>"
    highlight = "<< /Type /Annot /Subtype /Highlight /Rect [50 700 70 720] >>"
    path = page_with(tmp_path / "a.pdf", "6 0 R 7 0 R 8 0 R 9 0 R", field, note, link, highlight)
    [draft], _ = read(opened(path))
    assert draft.record["text"] == LINE
    assert draft.not_read == {"form field": 1, "annotation: note": 1, "annotation: highlight": 1}


def without_unicode(path: Path, html: str, pages: slice) -> Path:
    """Print pages, and remove the map from glyphs to Unicode of the fonts of some."""
    path.with_suffix(".html").write_text(f"<!doctype html><meta charset=utf-8>{html}")
    print_to_pdf(path.with_suffix(".html"), path)
    data = path.read_bytes()
    names = re.findall(rb"/ToUnicode \d+ 0 R", data)
    assert names
    for name in names[pages]:
        data = data.replace(name, name.replace(b"ToUnicode", b"NoUnicode"))
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["pdf", "pages"])
def test_a_font_without_unicode_is_rejected(tmp_path, kind):
    path = without_unicode(tmp_path / "a.pdf", f"<p style='font-family: DejaVu Sans'>{LINE}", slice(None))
    settings = ["min_characters=10"] if kind == "pages" else []
    drafts, [rejected] = read(opened(path, kind=kind, settings=settings))
    assert not drafts
    assert rejected.reason == "unmapped_font"
    assert rejected.items == {"files": 1, "pages": 1}


def test_the_other_pages_of_a_document_are_read(tmp_path):
    pages = [f"<p style='font-family: {font}; break-after: page'>{LINE}" for font in ("DejaVu Sans", "DejaVu Serif")]
    path = without_unicode(tmp_path / "a.pdf", f"{pages[0]}{pages[1]}{pages[0]}", slice(1, 2))
    found = list(opened(path).read(opened(path).units()[0]))
    drafts, [rejected] = read(opened(path))
    assert [draft.record["pages"] for draft in drafts] == [[1, 1], [3, 3]]
    assert (rejected.origin, rejected.reason) == ("a.pdf#page=2", "unmapped_font")
    check_accounts(opened(path), opened(path).units()[0], found)


def test_private_characters_are_named_and_bullets_of_office_programs_are_read(tmp_path):
    codes = {1: "F0B7", 2: "0041", 3: "E123"}
    entries = "".join(f"<{code:02X}> <{text}>\n" for code, text in codes.items())
    head = "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /X def"
    space = "1 begincodespacerange <00> <FF> endcodespacerange"
    cmap = stream(f"{head}\n{space}\n{len(codes)} beginbfchar\n{entries}endbfchar\nendcmap end end")
    font = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /ToUnicode 7 0 R >>"
    path = page_with(tmp_path / "a.pdf", "", font, cmap)
    data = path.read_bytes().replace(b"/F 4 0 R >> >> /Contents", b"/F 4 0 R /G 6 0 R >> >> /Contents")
    data = data.replace(b"Tj ET", b"Tj 0 -40 Td /G 11 Tf (\x01 \x02\x02\x03) Tj ET", 1)
    path.write_bytes(re.sub(rb"/Length \d+ >>\nstream\nBT", b"/Length 200 >>\nstream\nBT", data))
    [draft], _ = read(opened(path))
    assert draft.record["text"].split("\n\n") == [LINE, "• AA"]
    assert draft.not_read == {"character without Unicode": 1}


def test_blank_pages_are_named(tmp_path):
    document = pdfium.PdfDocument.new()
    document.new_page(600, 800)
    document.import_pages(pdfium.PdfDocument(page_with(tmp_path / "words.pdf", "", FONT)))
    document.new_page(600, 800)
    document.save(tmp_path / "blank.pdf")
    [draft], _ = read(opened(tmp_path / "blank.pdf"))
    assert (draft.record["pages"], draft.not_read) == ([1, 3], {"blank page": 2})
    given = opened(tmp_path / "blank.pdf", settings=["pages_per_sample=1"])
    blank, words, last = given.read(given.units()[0])
    assert isinstance(words, Draft)
    assert (blank, last) == (NotRead("blank page", 1, {"pages": 1}), NotRead("blank page", 1, {"pages": 1}))
    drafts, rejected = read(opened(tmp_path / "blank.pdf", kind="pages", settings=["min_characters=10"]))
    assert [reject.reason for reject in rejected] == ["no_text_layer", "no_text_layer"]
    assert [draft.items for draft in drafts] == [{"pages": 1, "files": 1}]


def test_pages_takes_a_folder_and_names_its_other_files(tmp_path):
    (tmp_path / "pdfs" / "deep").mkdir(parents=True)
    page_with(tmp_path / "pdfs" / "a.pdf", "", FONT)
    page_with(tmp_path / "pdfs" / "deep" / "b.PDF", "", FONT)
    (tmp_path / "pdfs" / "notes.log").write_text("x")
    given = opened(tmp_path / "pdfs", kind="pages", settings=["min_characters=10"])
    drafts, _ = read(given)
    assert [draft.origin for draft in drafts] == ["pdfs/a.pdf#page=1", "pdfs/deep/b.PDF#page=1"]
    assert all(isinstance(image, Media) for draft in drafts for image in draft.images)
    found = [entry for unit in given.units() for entry in given.read(unit) if isinstance(entry, NotRead)]
    assert found == [NotRead("file .log", 1, {"files": 1})]
