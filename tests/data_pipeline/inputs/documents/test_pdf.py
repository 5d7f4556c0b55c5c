"""PDFs that chromium, matplotlib and Pillow write: the text as it was written, in order, and the figures."""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import pypdfium2 as pdfium
import pytest
from matplotlib.backends.backend_pdf import PdfPages as MatplotlibPdf
from matplotlib.figure import Figure
from PIL import Image

from data_pipeline.domains import build_sample
from data_pipeline.errors import DataError
from data_pipeline.inputs.documents.pdf import PdfDocuments
from data_pipeline.inputs.draft import Draft, Rejected
from data_pipeline.inputs.ocr.pages import PdfPages
from tests import prose
from tests.data_pipeline.chromium import print_to_pdf
from tests.data_pipeline.media_files import encoded, pattern

CURVE = """<svg width="220" height="150" viewBox="0 0 220 150"><path d="M20 130 C 80 10, 120 140, 210 20" fill="none"
stroke="red"/><rect x="20" y="10" width="190" height="120" fill="none" stroke="black"/>
<text x="100" y="146" font-size="10">time</text><text x="2" y="70" font-size="10">v</text></svg>"""
STYLE = """@page { size: A4; margin: 3.7cm 2cm } body { font: 12pt serif } h1 { text-align: center }
.columns { column-count: 2; column-gap: 8mm; text-align: justify } p { margin: 0 0 6pt } .caption { font-size: 9pt }
.figure { break-inside: avoid; text-align: center; margin: 10pt 0 }"""


def long_sentences(count: int) -> list[str]:
    """Return paragraphs of one sentence each, in words alone.

    At the end of a column, a line that ends a sentence also ends the paragraph: these paragraphs have only one.
    """
    sentences = re.findall(r"(?<=[.] )[A-Z][A-Za-z ,']{30,}(?=[.])", prose.text())
    assert len(sentences) >= 5 * count
    several = [", and ".join(sentences[start : start + 5]) for start in range(0, 5 * count, 5)]
    return [f"{text.capitalize()}." for text in several]


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], bytes]:
    """A paper in two columns below a wide title and abstract, with hyphenated words and chromium's running heads.

    Returns:
        The PDF, its paragraphs and figures in order, and the photograph in it.
    """
    folder = tmp_path_factory.mktemp("paper")
    photograph = encoded(pattern(300, 400), quality=90)
    (folder / "photo.jpg").write_bytes(photograph)
    abstract, *body = long_sentences(40)
    written = [("paragraph", text) for text in body]
    written.insert(3, ("figure", "Figure 1: What a camera saw."))
    written.insert(9, ("curve", "Figure 2: A curve over time."))
    elements = {
        "paragraph": "<p>{}</p>",
        "figure": '<div class=figure><img src="photo.jpg" width=200><div class=caption>{}</div></div>',
        "curve": f"<div class=figure>{CURVE}<div class=caption>{{}}</div></div>",
    }
    columns = "".join(
        elements[kind].format(with_soft_hyphens(text) if kind == "paragraph" else escape(text))
        for kind, text in written
    )
    title = "On Images in Documents and What They Show to Their Patient Readers"
    page = f"<title>On Images</title><style>{STYLE}</style><h1>{title}</h1><p>{abstract}</p>"
    (folder / "paper.html").write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8>{page}<div class=columns>{columns}</div>"
    )
    print_to_pdf(folder / "paper.html", folder / "paper.pdf", heads=True)
    expected = [title, abstract]
    for kind, text in written:
        expected += [text] if kind == "paragraph" else ["<image>", text]
    return folder / "paper.pdf", expected, photograph


def with_soft_hyphens(text: str) -> str:
    return re.sub(r"([a-z]{4})(?=[a-z]{4})", r"\1&shy;", escape(text))


def drafts(kind: PdfDocuments | PdfPages) -> list[Draft]:
    found = [draft for unit in kind.units() for draft in kind.read(unit)]
    assert all(isinstance(draft, Draft) for draft in found), found
    return [draft for draft in found if isinstance(draft, Draft)]


def page_count(path: Path) -> int:
    count = len(pdfium.PdfDocument(path))
    assert count > 2
    return count


def rejections(path: Path) -> list[tuple[str, str]]:
    kind = PdfDocuments((str(path),))
    return [(r.origin, r.reason) for unit in kind.units() for r in kind.read(unit) if isinstance(r, Rejected)]


def test_a_paper_in_two_columns_is_read_as_it_was_written(paper):
    path, expected, photograph = paper
    (draft,) = drafts(PdfDocuments((str(path),)))
    assert draft.record["text"].split("\n\n") == expected
    assert draft.record["domain"] == "interleaved"
    assert draft.record["pages"] == [1, page_count(path)]
    assert draft.origin == "paper.pdf"
    build_sample(draft.record, images=2, videos=0)  # raises unless there is one placeholder per image

    photo, curve = draft.images
    assert photo.data == photograph  # the stored JPEG, byte for byte
    pixels = np.asarray(Image.open(io.BytesIO(curve.data)), np.int16)
    red = (pixels[..., 0] > 200) & (pixels[..., 1:] < 120).all(-1)
    assert red.any(0).mean() > 0.7  # the curve is in most columns of the image
    assert (pixels[:, : pixels.shape[1] // 20] < 128).any()  # the axis label is at its left edge


def test_pages_per_sample_divides_a_document_without_loss(paper):
    path, _, _ = paper
    (whole,) = drafts(PdfDocuments((str(path),)))
    samples = drafts(PdfDocuments((str(path),), pages_per_sample=2))
    count = page_count(path)
    firsts = range(1, count + 1, 2)
    assert [sample.record["pages"] for sample in samples] == [[first, min(first + 1, count)] for first in firsts]
    assert [sample.origin for sample in samples] == [f"paper.pdf#page={first}" for first in firsts]
    assert [image for sample in samples for image in sample.images] == list(whole.images)
    assert " ".join(sample.record["text"] for sample in samples).split() == whole.record["text"].split()


def test_figures_false_reads_text_only(paper):
    (draft,) = drafts(PdfDocuments((str(paper[0]),), figures=False))
    assert not draft.images
    assert "<image>" not in draft.record["text"]
    assert "Figure 1: What a camera saw." in draft.record["text"]


def test_pages_are_images_with_their_text(paper):
    path, expected, _ = paper
    pages = drafts(PdfPages((str(path),), dpi=72))
    assert [page.origin for page in pages] == [f"paper.pdf#page={number}" for number in range(1, page_count(path) + 1)]
    assert {page.record["domain"] for page in pages} == {"ocr"}
    for page in pages:
        (image,) = page.images
        assert Image.open(io.BytesIO(image.data)).size == pytest.approx((595, 842), abs=1)
    # A page may end in the middle of a word. Axis labels are part of its text.
    read = [text for page in pages for text in page.record["text"].split("\n\n") if text not in ("v", "time")]
    assert letters("".join(read)) == letters("".join(text for text in expected if text != "<image>"))


def letters(text: str) -> str:
    return re.sub(r"[\s‐-]", "", text)


def test_a_plot_is_one_image_that_includes_its_labels(tmp_path):
    figure = Figure(figsize=(6, 8))
    axes = figure.add_axes((0.2, 0.4, 0.6, 0.4))
    axes.plot(np.sin(np.arange(50) / 5))
    axes.set(xlabel="seconds", ylabel="metres", title="A wave")
    figure.text(0.1, 0.9, "The plot below shows how far a wave carries a boat.")
    figure.text(0.1, 0.2, "It comes back after a while.")
    figure.savefig(tmp_path / "plot.pdf")
    (draft,) = drafts(PdfDocuments((str(tmp_path / "plot.pdf"),), dpi=72))
    assert draft.record["text"] == (
        "The plot below shows how far a wave carries a boat.\n\n<image>\n\nIt comes back after a while."
    )
    width, height = Image.open(io.BytesIO(draft.images[0].data)).size
    assert 0.6 * 432 < width < 0.8 * 432
    assert 0.4 * 576 < height < 0.55 * 576


@pytest.mark.parametrize("angle", [0, 90, 180, 270])
def test_a_page_is_turned_so_that_its_text_is_upright(tmp_path, angle):
    lines = [f"Line {number} of a table that was set sideways" for number in range(5)]
    figure = Figure(figsize=(6, 6))
    for number, line in enumerate(lines):
        down = number / 20  # distance from the first line
        x, y = {0: (0.1, 0.9 - down), 90: (0.1 + down, 0.1), 180: (0.9, 0.1 + down), 270: (0.9 - down, 0.9)}[angle]
        near, far = ("left", "bottom") if angle < 180 else ("right", "top")
        figure.text(x, y, line, rotation=angle, ha=near, va=far)
    figure.savefig(tmp_path / "turned.pdf")
    (draft,) = drafts(PdfDocuments((str(tmp_path / "turned.pdf"),)))
    assert draft.record["text"].replace("\n\n", " ") == " ".join(lines)


def test_only_repeated_texts_in_margins_are_running_heads(tmp_path):
    with MatplotlibPdf(tmp_path / "book.pdf") as book:
        for number in range(4):
            page = Figure(figsize=(6, 8))
            page.text(0.1, 0.95, f"A book of waves {number + 7}")
            page.text(0.1, 0.93, ["At first.", "And then.", "Later on.", "At last."][number])
            page.text(0.1, 0.5, "The same sentence stands on every page.")
            page.text(0.5, 0.05, f"{number + 7}")
            book.savefig(page)
    (draft,) = drafts(PdfDocuments((str(tmp_path / "book.pdf"),)))
    found = re.findall(r"At first|And then|Later on|At last|book|\d", draft.record["text"])
    assert found == ["At first", "And then", "Later on", "At last"]
    assert draft.record["text"].count("The same sentence stands on every page.") == 4


def encrypted_pdf() -> bytes:
    """Return a document whose password is not the empty one."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 99 99] >>",
        b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <" + b"1f" * 32 + b"> /U <" + b"2e" * 32 + b"> >>",
    ]
    out, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    trailer = b"<< /Size 5 /Root 1 0 R /Encrypt 4 0 R /ID [<00> <00>] >>"
    return (
        out + b"xref\n0 5\n0000000000 65535 f \n" + table + b"trailer\n%s\nstartxref\n%d\n%%%%EOF" % (trailer, len(out))
    )


def test_unusable_documents_are_rejected_by_reason(tmp_path, paper):
    scan = Image.fromarray(pattern(400, 300))
    scan.save(tmp_path / "scan.pdf")
    (tmp_path / "locked.pdf").write_bytes(encrypted_pdf())
    (tmp_path / "cut.pdf").write_bytes(paper[0].read_bytes()[:300])
    (tmp_path / "page.pdf").write_bytes(b"<html>Not found</html>")
    (tmp_path / "empty.pdf").write_bytes(b"")
    found = {
        name: rejections(tmp_path / name) for name in ("scan.pdf", "locked.pdf", "cut.pdf", "page.pdf", "empty.pdf")
    }
    assert found == {
        "scan.pdf": [("scan.pdf", "no_text_layer")],
        "locked.pdf": [("locked.pdf", "encrypted")],
        "cut.pdf": [("cut.pdf", "unreadable_document")],
        "page.pdf": [("page.pdf", "unreadable_document")],
        "empty.pdf": [("empty.pdf", "unreadable_document")],
    }
    pages = PdfPages((str(tmp_path / "scan.pdf"),))
    (page,) = pages.read(pages.units()[0])
    assert isinstance(page, Rejected)
    assert page.reason == "no_text_layer"


def test_damaged_documents_are_read_or_rejected(tmp_path):
    figure = Figure(figsize=(4, 4))
    figure.subplots().imshow(pattern(40, 40))
    with matplotlib.rc_context({"pdf.compression": 0}):
        figure.savefig(tmp_path / "whole.pdf")
    whole = np.frombuffer((tmp_path / "whole.pdf").read_bytes(), np.uint8)
    rng = np.random.default_rng(3)
    path = tmp_path / "damaged.pdf"
    for _ in range(60):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 20)] = rng.integers(0, 256, 20)
        path.write_bytes(
            damaged[: rng.integers(1, len(whole) + 1)].tobytes() if rng.random() < 0.3 else damaged.tobytes()
        )
        kind = PdfDocuments((str(path),), dpi=36)
        for outcome in kind.read(kind.units()[0]):
            reasons = ("unreadable_document", "no_text_layer", "encrypted", "unmapped_font")
            assert not isinstance(outcome, Rejected) or outcome.reason in reasons


@pytest.mark.parametrize(
    ("options", "message"), [({"dpi": 3}, "36 to 600"), ({"pages_per_sample": -1}, "number of pages")]
)
def test_invalid_options_are_errors(options, message):
    with pytest.raises(DataError, match=message):
        PdfDocuments(("x.pdf",), **options)


def test_a_document_without_pages_is_rejected(tmp_path):
    document = pdfium.PdfDocument.new()
    document.save(tmp_path / "none.pdf")
    assert rejections(tmp_path / "none.pdf")[0][1] in ("empty_document", "unreadable_document")
