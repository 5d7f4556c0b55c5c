"""Images of pages with their markup in a file beside them. Pages of PDFs are tested in documents/test_pdf.py."""

from __future__ import annotations

import io

import pypdfium2 as pdfium
import pytest
from matplotlib.figure import Figure
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import Draft, NotRead, Rejected
from data_pipeline.inputs.ocr.pages import PagePairs, PdfPages
from tests.data_pipeline.media_files import encoded, pattern

PHOTO = encoded(pattern(60, 80))


def outcomes(kind: PagePairs) -> list[Draft | Rejected | NotRead]:
    return [outcome for unit in kind.units() for outcome in kind.read(unit)]


def test_images_are_paired_with_their_markup(tmp_path):
    (tmp_path / "scans").mkdir()
    for name in ("1.png", "2.png", "3.png", "4.png"):
        (tmp_path / "scans" / name).write_bytes(PHOTO)  # a JPEG with another suffix
    (tmp_path / "scans" / "1.md").write_text("# One\n")
    (tmp_path / "scans" / "2.tex").write_text(r"$x^2$")
    (tmp_path / "scans" / "4.md").write_text("\n")
    one, two, three, four = outcomes(PagePairs((str(tmp_path),)))
    assert isinstance(one, Draft)
    assert one.record == {"domain": "ocr", "text": "# One", "markup": "md"}
    assert [(image.extension, image.data) for image in one.images] == [("jpg", PHOTO)]
    assert isinstance(two, Draft)
    assert (two.record["text"], two.record["markup"]) == ("$x^2$", "tex")
    assert isinstance(three, Rejected)
    assert (three.origin, three.reason) == (f"{tmp_path.name}/scans/3.png", "no_markup")
    assert isinstance(four, Rejected)
    assert four.reason == "empty_document"
    assert [type(outcome) for outcome in outcomes(PagePairs((str(tmp_path),), markup=".tex"))].count(Draft) == 1


def test_a_suffix_without_its_dot_and_a_folder_without_images_are_errors(tmp_path):
    with pytest.raises(DataError, match="with its dot"):
        PagePairs((str(tmp_path),), markup="md")
    with pytest.raises(DataError, match="contains no images"):
        PagePairs((str(tmp_path),)).units()


def test_turned_pages_are_shown_as_viewers_show_them(tmp_path):
    figure = Figure(figsize=(4, 6))
    figure.text(0.5, 0.1, "Text that runs upwards in the file", rotation=90)
    figure.savefig(tmp_path / "stored.pdf")
    with pdfium.PdfDocument(tmp_path / "stored.pdf") as document:
        document[0].set_rotation(90)
        document.save(tmp_path / "turned.pdf")
    for name, size in (("stored", (800, 1200)), ("turned", (1200, 800))):
        kind = PdfPages((str(tmp_path / f"{name}.pdf"),), dpi=200, min_characters=1)
        (draft,) = kind.read(kind.units()[0])
        assert isinstance(draft, Draft)
        assert draft.record["text"] == "Text that runs upwards in the file"
        assert Image.open(io.BytesIO(draft.images[0].data)).size == size
