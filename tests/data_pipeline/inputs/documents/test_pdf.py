"""PDFs that chromium, matplotlib and Pillow print: text as the page's author wrote it, in order, and its figures."""

from __future__ import annotations

import io
import pydoc_data.topics
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
from data_pipeline.inputs.documents.reading_order import Box, Piece, joined_lines, lines_in_order, paragraphs
from data_pipeline.inputs.draft import Draft, Rejected
from data_pipeline.inputs.ocr.pages import PdfPages
from tests.data_pipeline.chromium import print_to_pdf
from tests.data_pipeline.media_files import encoded, pattern

CURVE = """<svg width="220" height="150" viewBox="0 0 220 150"><path d="M20 130 C 80 10, 120 140, 210 20" fill="none"
stroke="red"/><rect x="20" y="10" width="190" height="120" fill="none" stroke="black"/>
<text x="100" y="146" font-size="10">time</text><text x="2" y="70" font-size="10">v</text></svg>"""
STYLE = """@page { size: A4; margin: 2cm } body { font: 12pt serif } h1 { text-align: center }
.columns { column-count: 2; column-gap: 8mm; text-align: justify } p { margin: 0 0 6pt } .caption { font-size: 9pt }
.figure { break-inside: avoid; text-align: center; margin: 10pt 0 }"""


def prose(count: int) -> list[str]:
    """Paragraphs of Python's reference, without a hyphen of their own (which could fall on the end of a line)."""
    paragraphs = (" ".join(p.split()) for topic in sorted(pydoc_data.topics.topics) for p in _paragraphs_of(topic))
    fit = dict.fromkeys(p for p in paragraphs if re.fullmatch(r"[A-Z][A-Za-z ,.:;()']{150,700}\.", p))
    return list(fit)[:count]


def _paragraphs_of(topic: str) -> list[str]:
    return [p for p in pydoc_data.topics.topics[topic].split("\n\n") if not p.startswith(" ")]


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], bytes]:
    """A paper in two columns below a wide title and abstract, words hyphenated, with chromium's running
    heads; its paragraphs in order, and the photograph in it."""
    folder = tmp_path_factory.mktemp("paper")
    photograph = encoded(pattern(300, 400), quality=90)
    (folder / "photo.jpg").write_bytes(photograph)
    abstract, *body = prose(40)
    written = [("p", text) for text in body]
    written.insert(3, ("figure", "Figure 1: What a camera saw."))
    written.insert(9, ("curve", "Figure 2: A curve over time."))
    shown = {
        "p": "<p>{}</p>",
        "figure": '<div class=figure><img src="photo.jpg" width=200><div class=caption>{}</div></div>',
        "curve": f"<div class=figure>{CURVE}<div class=caption>{{}}</div></div>",
    }
    columns = "".join(shown[kind].format(hyphenated(text) if kind == "p" else escape(text)) for kind, text in written)
    title = "On Pictures in Documents and What They Show to Their Patient Readers"
    page = f"<title>On Pictures</title><style>{STYLE}</style><h1>{title}</h1><p>{abstract}</p>"
    (folder / "paper.html").write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8>{page}<div class=columns>{columns}</div>"
    )
    print_to_pdf(folder / "paper.html", folder / "paper.pdf", heads=True)
    truth = [title, abstract]
    for kind, text in written:
        truth += [text] if kind == "p" else ["<image>", text]
    return folder / "paper.pdf", truth, photograph


def hyphenated(text: str) -> str:
    return re.sub(r"([a-z]{4})(?=[a-z]{4})", r"\1&shy;", escape(text))


def drafts(kind: PdfDocuments | PdfPages) -> list[Draft]:
    found = [draft for unit in kind.units() for draft in kind.read(unit)]
    assert all(isinstance(draft, Draft) for draft in found), found
    return [draft for draft in found if isinstance(draft, Draft)]


def pages_of(path: Path) -> int:
    pages = len(pdfium.PdfDocument(path))
    assert pages > 2
    return pages


def rejections(path: Path) -> list[tuple[str, str]]:
    kind = PdfDocuments((str(path),))
    return [(r.origin, r.reason) for unit in kind.units() for r in kind.read(unit) if isinstance(r, Rejected)]


def test_a_paper_in_two_columns_reads_as_it_was_written(paper):
    path, truth, photograph = paper
    (draft,) = drafts(PdfDocuments((str(path),)))
    assert draft.record["text"].split("\n\n") == truth
    assert draft.record["domain"] == "interleaved"
    assert draft.record["pages"] == [1, pages_of(path)]
    assert draft.origin == "paper.pdf"
    build_sample(draft.record, images=2, videos=0)  # as many placeholders as images, or it raises

    photo, curve = draft.images
    assert photo.data == photograph  # the stored JPEG, byte for byte
    drawn = np.asarray(Image.open(io.BytesIO(curve.data)), np.int16)
    red = (drawn[..., 0] > 200) & (drawn[..., 1:] < 120).all(-1)
    assert red.any(0).mean() > 0.7  # the curve runs through most of the picture
    assert (drawn[:, : drawn.shape[1] // 20] < 128).any()  # with the axis's name on its left


def test_runs_of_pages_hold_what_the_whole_holds(paper):
    path, _, _ = paper
    (whole,) = drafts(PdfDocuments((str(path),)))
    runs = drafts(PdfDocuments((str(path),), pages_per_sample=2))
    pages = pages_of(path)
    assert [run.record["pages"] for run in runs] == [[first, min(first + 1, pages)] for first in range(1, pages + 1, 2)]
    assert [run.origin for run in runs] == [f"paper.pdf#page={first}" for first in range(1, pages + 1, 2)]
    assert [image for run in runs for image in run.images] == list(whole.images)
    assert " ".join(run.record["text"] for run in runs).split() == whole.record["text"].split()


def test_without_figures_only_text_is_read(paper):
    (draft,) = drafts(PdfDocuments((str(paper[0]),), figures=False))
    assert not draft.images
    assert "<image>" not in draft.record["text"]
    assert "Figure 1: What a camera saw." in draft.record["text"]


def test_pages_are_pictures_with_their_text(paper):
    path, truth, _ = paper
    pages = drafts(PdfPages((str(path),), dpi=72))
    assert [page.origin for page in pages] == [f"paper.pdf#page={number}" for number in range(1, pages_of(path) + 1)]
    assert {page.record["domain"] for page in pages} == {"ocr"}
    for page in pages:
        (image,) = page.images
        assert Image.open(io.BytesIO(image.data)).size == pytest.approx((595, 842), abs=1)
    # A page ends where it ends, in the middle of a word too, and the names of axes are written on it.
    read = [text for page in pages for text in page.record["text"].split("\n\n") if text not in ("v", "time")]
    assert letters("".join(read)) == letters("".join(text for text in truth if text != "<image>"))


def letters(text: str) -> str:
    return re.sub(r"[\s‐-]", "", text)


def test_a_plot_is_one_picture_and_its_labels_are_no_text(tmp_path):
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
def test_a_page_is_turned_until_its_text_stands_upright(tmp_path, angle):
    lines = [f"Line {number} of a table that was set sideways" for number in range(5)]
    figure = Figure(figsize=(6, 6))
    for number, line in enumerate(lines):
        down = number / 20  # from one line to the next
        x, y = {0: (0.1, 0.9 - down), 90: (0.1 + down, 0.1), 180: (0.9, 0.1 + down), 270: (0.9 - down, 0.9)}[angle]
        near, far = ("left", "bottom") if angle < 180 else ("right", "top")
        figure.text(x, y, line, rotation=angle, ha=near, va=far)
    figure.savefig(tmp_path / "turned.pdf")
    (draft,) = drafts(PdfDocuments((str(tmp_path / "turned.pdf"),)))
    assert draft.record["text"].replace("\n\n", " ") == " ".join(lines)


def test_running_heads_need_to_come_again(tmp_path):
    with MatplotlibPdf(tmp_path / "book.pdf") as book:
        for number in range(4):
            page = Figure(figsize=(6, 8))
            page.text(0.1, 0.95, f"A book of waves {number + 7}")
            page.text(0.1, 0.93, ["At first.", "And then.", "Later on.", "At last."][number])
            page.text(0.1, 0.5, "The same sentence stands on every page.")
            page.text(0.5, 0.05, f"{number + 7}")
            book.savefig(page)
    (draft,) = drafts(PdfDocuments((str(tmp_path / "book.pdf"),)))
    assert re.findall(r"At first|And then|Later on|At last|book|\d", draft.record["text"]) == [
        *("At first", "And then", "Later on", "At last")
    ]
    assert draft.record["text"].count("The same sentence stands on every page.") == 4


def encrypted_pdf() -> bytes:
    """A document whose password is not the empty one."""
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


def test_documents_that_cannot_be_used_are_counted_by_reason(tmp_path, paper):
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
            assert isinstance(outcome, Draft) or outcome.reason in ("unreadable_document", "no_text_layer", "encrypted")


@pytest.mark.parametrize(
    ("options", "says"), [({"dpi": 3}, "36 to 600"), ({"pages_per_sample": -1}, "number of pages")]
)
def test_options_that_cannot_be(options, says):
    with pytest.raises(DataError, match=says):
        PdfDocuments(("x.pdf",), **options)


# --- the order of boxes -----------------------------------------------------------------------------------------------


def line(text: str, left: float, top: float, width: float) -> Piece:
    return Piece(Box(left, top, left + width, top + 10), text, 10)


def column(name: str, left: float, top: float, rows: int) -> list[Piece]:
    return [line(f"{name}{row} and some more words", left, top + 12 * row, 200) for row in range(rows)]


def test_columns_are_read_between_what_spans_them():
    expected = [
        line("A title over all of it", 100, 10, 300),
        *column("a", 40, 40, 5),
        *column("b", 270, 40, 5),
        Piece(Box(50, 110, 450, 200), figure="wide"),
        line("Figure 1: what spans both columns", 60, 210, 380),
        *column("c", 40, 240, 4),
        *column("d", 270, 240, 6),
    ]
    for seed in range(20):
        shuffled = [expected[index] for index in np.random.default_rng(seed).permutation(len(expected))]
        found = lines_in_order(shuffled)
        assert [piece.text or piece.figure for piece in found] == [piece.text or piece.figure for piece in expected]


def test_three_columns_are_cut_twice():
    expected = [piece for name, left in (("a", 20), ("b", 240), ("c", 460)) for piece in column(name, left, 30, 8)]
    found = lines_in_order([expected[index] for index in np.random.default_rng(1).permutation(len(expected))])
    assert [piece.text for piece in found] == [piece.text for piece in expected]


def test_tables_and_numbered_lines_are_read_by_rows():
    table = [
        line(f"{cell}{row}", 40 + 150 * place, 20 + 12 * row, 30)
        for row in range(9)
        for place, cell in enumerate("xyz")
    ]
    assert [found.text for found in lines_in_order(table)] == [f"x{row} y{row} z{row}" for row in range(9)]
    numbered = [
        piece for row in range(9) for piece in (line(f"{row}.", 20, 12 * row, 8), line("words " * 5, 40, 12 * row, 300))
    ]
    assert [found.text for found in lines_in_order(numbered)] == [f"{row}. {'words ' * 5}" for row in range(9)]


def test_paragraphs_begin_at_gaps_indents_and_other_sizes():
    lines = [
        Piece(Box(40, 0, 200, 20), "A heading", 20),
        line("First paragraph that runs over", 40, 30, 300),
        line("two lines and ends here, quite far right.", 40, 42, 290),
        line("Second one, indented by an em and a half,", 55, 54, 285),
        line("goes on at the margin.", 40, 66, 150),
        line("After a gap, the third.", 40, 100, 160),
    ]
    assert [piece.text for piece in paragraphs(lines_in_order(lines))] == [
        "A heading",
        "First paragraph that runs over two lines and ends here, quite far right.",
        "Second one, indented by an em and a half, goes on at the margin.",
        "After a gap, the third.",
    ]


@pytest.mark.parametrize(
    ("first", "second", "words", "joined"),
    [
        ("an infor-", "mation desk", set(), "an information desk"),
        ("an infor‐", "mation desk", set(), "an information desk"),
        ("a well-", "known desk", {"well-known"}, "a well-known desk"),
        ("a well-", "known desk", {"well-known", "wellknown"}, "a wellknown desk"),
        ("state-of-the-", "art desks", set(), "state-of-the-art desks"),
        ("a fixed-", "length list", {"fixed", "length"}, "a fixed-length list"),
        ("from 1990-", "2000 on", set(), "from 1990- 2000 on"),
        ("the Franco-", "Prussian war", set(), "the Franco- Prussian war"),
        ("图中有一只", "猫。", set(), "图中有一只猫。"),
        ("plain words", "follow", set(), "plain words follow"),
    ],
)
def test_lines_are_joined_as_a_reader_joins_them(first, second, words, joined):
    assert joined_lines(first, second, words) == joined


def test_an_old_pdf_without_pages_is_rejected(tmp_path):
    document = pdfium.PdfDocument.new()
    document.save(tmp_path / "none.pdf")
    assert rejections(tmp_path / "none.pdf")[0][1] in ("empty_document", "unreadable_document")
