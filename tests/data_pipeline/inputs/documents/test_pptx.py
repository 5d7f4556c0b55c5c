"""Slides that python-pptx writes, as interleaved samples."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from pptx import Presentation
from pptx.oxml.ns import qn
from pptx.shapes.group import GroupShape
from pptx.shapes.picture import Picture
from pptx.util import Inches

from data_pipeline.domains import build_sample
from data_pipeline.errors import DataError
from data_pipeline.inputs.documents.pptx import Slides
from data_pipeline.inputs.draft import Draft, Rejected
from tests.data_pipeline.media_files import encoded, pattern

PHOTO, LOGO, GROUPED = encoded(pattern(60, 80)), encoded(pattern(8, 8), "PNG"), encoded(pattern(40, 40), "PNG")
FIRST = "# Cats < image >\n\n<image>\n\non the right\n\nin a group\n\n<image>\n\nat the bottom"
SECOND = "# Weights\n\nby name\n  and kilogram\n\n| cat | kg |\n| --- | --- |\n| Tom | 5\\|6 |"


@pytest.fixture
def deck(tmp_path: Path) -> Path:
    """Three slides. The shapes of the first are not stored in reading order; the last slide is hidden."""
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
    hidden.element.set("show", "0")
    presentation.save(str(tmp_path / "deck.pptx"))
    return tmp_path / "deck.pptx"


def outcomes(kind: Slides) -> list[Draft | Rejected]:
    return [outcome for unit in kind.units() for outcome in kind.read(unit)]


def drafts(kind: Slides) -> list[Draft]:
    found = outcomes(kind)
    assert all(isinstance(outcome, Draft) for outcome in found), found
    return [outcome for outcome in found if isinstance(outcome, Draft)]


def test_slides_are_read_from_the_title_down(deck):
    (draft,) = drafts(Slides((str(deck),)))
    assert draft.record == {
        "domain": "interleaved",
        "text": f"{FIRST}\n\n{SECOND}",
        "slides": [1, 3],
        "dropped_images": {"small_image": 1},
    }
    assert [(image.extension, image.data) for image in draft.images] == [("jpg", PHOTO), ("png", GROUPED)]
    build_sample(draft.record, images=2, videos=0)  # raises unless there is one placeholder per image


def test_each_slide_can_be_a_sample_with_its_notes(deck):
    first, second = drafts(Slides((str(deck),), slides_per_sample=1, notes=True))
    assert (first.record["text"], first.origin) == (f"{FIRST}\n\nSpeak slowly.", "deck.pptx#slide=1")
    assert (second.record["text"], second.record["slides"]) == (SECOND, [2, 2])


def test_damaged_images_are_dropped_alone(tmp_path, deck):
    """A linked image, an image whose part is missing, and a shape of a type that python-pptx does not know."""
    presentation = Presentation(str(deck))
    shapes = presentation.slides[0].shapes
    linked, _ = (shape for shape in shapes if isinstance(shape, Picture))
    missing = next(part for shape in shapes if isinstance(shape, GroupShape) for part in shape.shapes)
    blip = linked.element.find(f".//{qn('a:blip')}")
    del blip.attrib[qn("r:embed")]
    blip.set(qn("r:link"), "rId99")
    missing.element.find(f".//{qn('a:blip')}").set(qn("r:embed"), "rId98")
    unknown = shapes.add_textbox(Inches(1), Inches(7), Inches(3), Inches(1))
    unknown.text_frame.text = "of no type"
    del unknown.element.nvSpPr.cNvSpPr.attrib["txBox"]
    unknown.element.spPr.remove(unknown.element.spPr.prstGeom)
    presentation.save(str(tmp_path / "damaged.pptx"))
    (draft,) = drafts(Slides((str(tmp_path / "damaged.pptx"),)))
    first = "# Cats < image >\n\non the right\n\nin a group\n\nat the bottom\n\nof no type"
    assert draft.record["text"] == f"{first}\n\n{SECOND}"
    assert draft.record["dropped_images"] == {"missing_file": 2, "small_image": 1}


def test_unusable_presentations_are_rejected(tmp_path, deck):
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
