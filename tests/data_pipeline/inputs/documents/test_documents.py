"""Slides that python-pptx writes, plain text, and pictures of pages with their markup beside them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from pptx import Presentation
from pptx.oxml.ns import _nsmap as nsmap
from pptx.shapes.group import GroupShape
from pptx.shapes.picture import Picture
from pptx.util import Inches

from data_pipeline.domains import build_sample
from data_pipeline.errors import DataError
from data_pipeline.inputs.documents.plain_text import TextFiles
from data_pipeline.inputs.documents.pptx import Slides
from data_pipeline.inputs.draft import Draft, Rejected
from data_pipeline.inputs.ocr.pages import PagePairs
from tests.data_pipeline.media_files import encoded, pattern

PHOTO, LOGO, GROUPED = encoded(pattern(60, 80)), encoded(pattern(8, 8), "PNG"), encoded(pattern(40, 40), "PNG")


@pytest.fixture
def deck(tmp_path: Path) -> Path:
    """Three slides; the shapes of the first are not in the order in which they stand, the last one is hidden."""
    presentation = Presentation()
    slide = presentation.slides.add_slide(presentation.slide_layouts[5])  # title only
    slide.shapes.add_textbox(Inches(5), Inches(2), Inches(3), Inches(1)).text_frame.text = "on the right"
    slide.shapes.add_textbox(Inches(1), Inches(6), Inches(3), Inches(1)).text_frame.text = "at the bottom"
    slide.shapes.add_picture(io.BytesIO(PHOTO), Inches(1), Inches(2.1), Inches(2))
    slide.shapes.add_picture(io.BytesIO(LOGO), Inches(9), Inches(0))
    slide.shapes.title.text = "Cats <image>"
    group = slide.shapes.add_group_shape()
    group.shapes.add_picture(io.BytesIO(GROUPED), Inches(4), Inches(5), Inches(1))
    group.shapes.add_textbox(Inches(1), Inches(5), Inches(2), Inches(1)).text_frame.text = "in a group"
    slide.notes_slide.notes_text_frame.text = "Speak slowly."

    slide = presentation.slides.add_slide(presentation.slide_layouts[1])  # title and content
    slide.shapes.title.text = "Weights"
    body = slide.placeholders[1].text_frame
    body.text = "by name"
    body.add_paragraph().text = "and kilogram"
    body.paragraphs[1].level = 1
    table = slide.shapes.add_table(2, 2, Inches(1), Inches(5), Inches(4), Inches(1)).table
    for row, cells in enumerate((("cat", "kg"), ("Tom", "5|6"))):
        for column, text in enumerate(cells):
            table.cell(row, column).text = text

    hidden = presentation.slides.add_slide(presentation.slide_layouts[5])
    hidden.shapes.title.text = "Not shown"
    hidden._element.set("show", "0")
    presentation.save(str(tmp_path / "deck.pptx"))
    return tmp_path / "deck.pptx"


FIRST = "# Cats < image >\n\n<image>\n\non the right\n\nin a group\n\n<image>\n\nat the bottom"
SECOND = "# Weights\n\nby name\n  and kilogram\n\n| cat | kg |\n| --- | --- |\n| Tom | 5\\|6 |"


def outcomes(kind: Slides | TextFiles | PagePairs) -> list[Any]:
    return [outcome for unit in kind.units() for outcome in kind.read(unit)]


def test_slides_are_read_from_their_titles_down(deck):
    (draft,) = outcomes(Slides((str(deck),)))
    assert isinstance(draft, Draft)
    assert draft.record == {
        "domain": "interleaved",
        "text": f"{FIRST}\n\n{SECOND}",
        "slides": [1, 3],
        "dropped_images": {"small_image": 1},
    }
    assert [(image.extension, image.data) for image in draft.images] == [("jpg", PHOTO), ("png", GROUPED)]
    build_sample(draft.record, images=2, videos=0)  # as many placeholders as images, or it raises


def test_slides_may_be_samples_of_their_own_and_have_notes(deck):
    first, second = outcomes(Slides((str(deck),), slides_per_sample=1, notes=True))
    assert (first.record["text"], first.origin) == (f"{FIRST}\n\nSpeak slowly.", "deck.pptx#slide=1")
    assert (second.record["text"], second.record["slides"]) == (SECOND, [2, 2])


def test_what_is_odd_in_a_deck_costs_itself_only(tmp_path, deck):
    """A picture that lies elsewhere, one whose part is gone, and a shape of no kind that python-pptx knows."""
    presentation = Presentation(str(deck))
    shapes = presentation.slides[0].shapes
    linked, _ = (shape for shape in shapes if isinstance(shape, Picture))
    gone = next(part for shape in shapes if isinstance(shape, GroupShape) for part in shape.shapes)
    at = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}"
    blip = linked.element.find(f".//{{{nsmap['a']}}}blip")
    del blip.attrib[f"{at}embed"]
    blip.set(f"{at}link", "rId99")
    gone.element.find(f".//{{{nsmap['a']}}}blip").set(f"{at}embed", "rId98")
    odd = shapes.add_textbox(Inches(1), Inches(7), Inches(3), Inches(1))
    odd.text_frame.text = "of no kind"
    del odd.element.nvSpPr.cNvSpPr.attrib["txBox"]
    odd.element.spPr.remove(odd.element.spPr.prstGeom)
    presentation.save(str(tmp_path / "odd.pptx"))
    (draft,) = outcomes(Slides((str(tmp_path / "odd.pptx"),)))
    first = "# Cats < image >\n\non the right\n\nin a group\n\nat the bottom\n\nof no kind"
    assert draft.record["text"] == f"{first}\n\n{SECOND}"
    assert draft.record["dropped_images"] == {"missing_file": 2, "small_image": 1}


def test_presentations_that_cannot_be_used(tmp_path, deck):
    Presentation().save(str(tmp_path / "empty.pptx"))
    (tmp_path / "cut.pptx").write_bytes(deck.read_bytes()[:2000])
    (tmp_path / "locked.pptx").write_bytes(bytes.fromhex("d0cf11e0a1b11ae1") + bytes(600))
    broken = deck.read_bytes().replace(b"ppt/presentation.xml", b"ppt/presentation.xxx")
    (tmp_path / "broken.pptx").write_bytes(broken)
    names = ("empty", "cut", "locked", "broken")
    found = outcomes(Slides(tuple(str(tmp_path / f"{name}.pptx") for name in names)))
    assert [(r.origin, r.reason) for r in found if isinstance(r, Rejected)] == [
        ("empty.pptx", "empty_document"),
        ("cut.pptx", "unreadable_document"),
        ("locked.pptx", "encrypted"),
        ("broken.pptx", "unreadable_document"),
    ]
    with pytest.raises(DataError, match="number of slides"):
        Slides((str(deck),), slides_per_sample=-1)


def test_text_files(tmp_path, monkeypatch):
    for name, content in {
        "a.txt": "\ufeffOne line.\r\nAnother, with <image>.\n".encode(),
        "b.txt": b" \n",
        "c.txt": "Käse".encode("latin-1"),
        "d.txt": "words".encode("utf-16-le"),
    }.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path.parent)
    assert isinstance(outcomes(TextFiles((f"{tmp_path.name}/a.txt",)))[0], Draft)
    draft, *rejected = outcomes(TextFiles(tuple(str(tmp_path / f"{name}.txt") for name in "abcd")))
    assert draft == Draft({"domain": "text", "text": "One line.\nAnother, with <image>."}, origin="a.txt")
    assert [(r.origin, r.reason) for r in rejected] == [
        ("b.txt", "empty_document"),
        ("c.txt", "not_utf8"),
        ("d.txt", "not_utf8"),
    ]


def test_pages_with_their_markup_beside_them(tmp_path):
    (tmp_path / "scans").mkdir()
    for name in ("1.png", "2.png", "3.png", "4.png"):
        (tmp_path / "scans" / name).write_bytes(PHOTO)  # a JPEG by another name
    (tmp_path / "scans" / "1.md").write_text("# One\n")
    (tmp_path / "scans" / "2.tex").write_text(r"$x^2$")
    (tmp_path / "scans" / "4.md").write_text("\n")
    one, two, three, four = outcomes(PagePairs((str(tmp_path),)))
    assert one.record == {"domain": "ocr", "text": "# One", "markup": "md"}
    assert [(image.extension, image.data) for image in one.images] == [("jpg", PHOTO)]
    assert (two.record["text"], two.record["markup"]) == ("$x^2$", "tex")
    assert (three.origin.endswith("scans/3.png"), three.reason, four.reason) == (True, "no_markup", "empty_document")
    assert [type(outcome) for outcome in outcomes(PagePairs((str(tmp_path),), markup=".tex"))].count(Draft) == 1
    with pytest.raises(DataError, match="with its dot"):
        PagePairs((str(tmp_path),), markup="md")
    with pytest.raises(DataError, match="no picture"):
        PagePairs((str(tmp_path / "scans" / "nothing"),)).units() if (
            tmp_path / "scans" / "nothing"
        ).mkdir() is None else 0
