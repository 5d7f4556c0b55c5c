"""Slides that python-pptx writes, as interleaved samples."""

from __future__ import annotations

import io
import re
import zipfile
from datetime import date
from pathlib import Path

import pytest
from PIL import Image
from pptx import Presentation
from pptx.chart.data import CategoryChartData, XyChartData
from pptx.enum.chart import XL_CHART_TYPE
from pptx.opc.package import Part
from pptx.opc.packuri import PackURI
from pptx.oxml import parse_xml
from pptx.oxml.ns import qn
from pptx.shapes.group import GroupShape
from pptx.shapes.picture import Picture
from pptx.util import Inches

from data_pipeline.domains import build_sample
from data_pipeline.errors import DataError
from data_pipeline.inputs.documents.office_math import tex_of
from data_pipeline.inputs.documents.pptx import Slides
from data_pipeline.inputs.draft import Draft, NotRead, Rejected
from tests.data_pipeline.inputs.reading import opened, read
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
    found = [outcome for unit in kind.units() for outcome in kind.read(unit)]
    read(kind)  # checks the accounts
    return [outcome for outcome in found if not isinstance(outcome, NotRead)]


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


AS = 'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main"'
PS = 'xmlns:p="http://schemas.openxmlformats.org/presentationml/2006/main"'
MC = 'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
RS = 'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships"'
MATH = 'xmlns:m="http://schemas.openxmlformats.org/officeDocument/2006/math"'
A14 = 'xmlns:a14="http://schemas.microsoft.com/office/drawing/2010/main"'


def saved(path: Path, build) -> Path:
    """Save a presentation of one slide with a title, to which `build` adds."""
    presentation = Presentation()
    slide = presentation.slides.add_slide(presentation.slide_layouts[5])
    slide.shapes.title.text = "Title"
    build(slide)
    presentation.save(str(path))
    return path


def box(text: str) -> str:
    place = '<a:xfrm><a:off x="0" y="3000000"/><a:ext cx="9" cy="9"/></a:xfrm><a:prstGeom prst="rect"/>'
    return (
        '<p:sp><p:nvSpPr><p:cNvPr id="9" name="Box"/><p:cNvSpPr txBox="1"/><p:nvPr/></p:nvSpPr>'
        f"<p:spPr>{place}</p:spPr><p:txBody><a:bodyPr/><a:p>{text}</a:p></p:txBody></p:sp>"
    )


def run(text: str, tag: str = "m") -> str:
    return f"<{tag}:r><{tag}:t>{text}</{tag}:t></{tag}:r>"


EQUATION = (
    f"<m:f><m:num>{run('a')}</m:num><m:den>{run('2b')}</m:den></m:f>{run('=')}"
    f"<m:sSup><m:e>{run('x')}</m:e><m:sup>{run('n+1')}</m:sup></m:sSup>{run('+')}"
    f"<m:rad><m:deg/><m:e>{run('y')}</m:e></m:rad>"
)


def test_equations_of_powerpoint_are_read_as_tex(tmp_path):
    equation = f"<a14:m><m:oMathPara><m:oMath>{EQUATION}</m:oMath></m:oMathPara></a14:m>"
    choice = f'<mc:Choice Requires="a14">{box(run("So ", "a") + equation)}</mc:Choice>'
    xml = f"<mc:AlternateContent {AS} {PS} {MC} {MATH} {A14}>{choice}<mc:Fallback>{box(run(' ', 'a'))}</mc:Fallback>"
    path = saved(
        tmp_path / "a.pptx",
        lambda slide: slide.shapes._spTree.append(parse_xml(f"{xml}</mc:AlternateContent>")),
    )
    (draft,) = drafts(Slides((str(path),)))
    assert draft.record["text"] == "# Title\n\nSo $\\frac{a}{2b}=x^{n+1}+\\sqrt{y}$"


def test_raised_and_lowered_runs_are_marked(tmp_path):
    def build(slide):
        paragraph = slide.shapes.add_textbox(0, Inches(3), Inches(3), Inches(1)).text_frame.paragraphs[0]
        for text, baseline in (("10", 0), ("6", 30000), (" H", 0), ("2", -25000), ("O", 0)):
            added = paragraph.add_run()
            added.text = text
            if baseline:
                added._r.get_or_add_rPr().set("baseline", str(baseline))

    (draft,) = drafts(Slides((str(saved(tmp_path / "a.pptx", build)),)))
    assert draft.record["text"] == "# Title\n\n10^6 H_2O"


def test_charts_are_read_as_tables(tmp_path):
    def build(slide):
        sales = CategoryChartData()
        sales.categories = ["East", "West"]
        sales.add_series("Q1 | sales", (19.2, 21.4))
        sales.add_series("Q2", (None, 3))
        place = (Inches(0), Inches(2), Inches(4), Inches(3))
        chart = slide.shapes.add_chart(XL_CHART_TYPE.COLUMN_CLUSTERED, *place, sales).chart
        chart.has_title = True
        chart.chart_title.text_frame.text = "Sales by region"
        points = XyChartData()
        series = points.add_series("heights")
        series.add_data_point(0.5, 1.5)
        series.add_data_point(2, 3)
        slide.shapes.add_chart(XL_CHART_TYPE.XY_SCATTER, 0, Inches(6), Inches(4), Inches(3), points)

    (draft,) = drafts(Slides((str(saved(tmp_path / "a.pptx", build)),)))
    assert draft.record["text"].split("\n\n")[1:] == [
        "Sales by region",
        "|  | Q1 \\| sales | Q2 |\n| --- | --- | --- |\n| East | 19.2 |  |\n| West | 21.4 | 3 |",
        "|  | heights |\n| --- | --- |\n| 0.5 | 1.5 |\n| 2 | 3 |",
    ]


def test_only_the_visible_part_of_a_cropped_image_is_read(tmp_path):
    def build(slide):
        image = slide.shapes.add_picture(io.BytesIO(GROUPED), Inches(1), Inches(3), Inches(1))
        image.crop_left, image.crop_bottom = 0.1, 0.05

    (draft,) = drafts(Slides((str(saved(tmp_path / "a.pptx", build)),)))
    [image] = draft.images
    whole = Image.open(io.BytesIO(GROUPED))
    assert Image.open(io.BytesIO(image.data)).tobytes() == whole.crop((4, 0, 40, 38)).tobytes()


def test_what_slides_hold_beside_text_is_named(tmp_path, deck):
    def build(slide):
        hidden = slide.shapes.add_textbox(0, Inches(3), Inches(3), Inches(1))
        hidden.text_frame.text = "no one sees this"
        hidden._element.nvSpPr.cNvPr.set("hidden", "1")
        (tmp_path / "video.mp4").write_bytes(b"video")
        slide.shapes.add_movie(str(tmp_path / "video.mp4"), 0, Inches(4), Inches(2), Inches(2), io.BytesIO(GROUPED))
        (tmp_path / "book.xlsx").write_bytes(b"book")
        slide.shapes.add_ole_object(str(tmp_path / "book.xlsx"), "Excel.Sheet.12", 0, Inches(6), Inches(1), Inches(1))
        slide.notes_slide.notes_text_frame.text = "Speak slowly."

    (draft,) = drafts(Slides((str(saved(tmp_path / "a.pptx", build)),)))
    assert (draft.record["text"], len(draft.images)) == ("# Title", 0)
    assert draft.not_read == {"hidden shape": 1, "video": 1, "OLE object": 1, "notes": 1}
    given = opened(deck, settings=["slides_per_sample=1"])
    *_, last = given.read(given.units()[0])
    assert last == NotRead("hidden slide", 1, {"slides": 1})
    assert given.given(given.units()[0]) == {"files": 1, "slides": 3}


DIAGRAM = f"""<dgm:dataModel xmlns:dgm="http://schemas.openxmlformats.org/drawingml/2006/diagram" {AS}><dgm:ptLst>
<dgm:pt modelId="0" type="doc"/><dgm:pt modelId="2"><dgm:t><a:p>{run("Test", "a")}</a:p></dgm:t></dgm:pt>
<dgm:pt modelId="1"><dgm:t><a:p>{run("Plan", "a")}</a:p></dgm:t></dgm:pt>
<dgm:pt modelId="3"><dgm:t><a:p>{run("with care", "a")}</a:p></dgm:t></dgm:pt></dgm:ptLst><dgm:cxnLst>
<dgm:cxn modelId="7" srcId="0" destId="1" srcOrd="0" destOrd="0"/><dgm:cxn modelId="8" srcId="0" destId="2" srcOrd="1"/>
<dgm:cxn modelId="9" srcId="1" destId="3" srcOrd="0" destOrd="0"/></dgm:cxnLst></dgm:dataModel>"""


@pytest.mark.parametrize("stored", [True, False])
def test_the_text_of_smartart_is_read_or_the_diagram_is_named(tmp_path, stored):
    def build(slide):
        name = PackURI("/ppt/diagrams/data1.xml")
        part = Part(name, "application/xml", slide.part.package, DIAGRAM.encode())
        link = slide.part.relate_to(
            part, "http://schemas.openxmlformats.org/officeDocument/2006/relationships/diagramData"
        )
        uri = "http://schemas.openxmlformats.org/drawingml/2006/diagram"
        ids = f'<dgm:relIds xmlns:dgm="{uri}" {RS} r:dm="{link if stored else "rId99"}"/>'
        data = f'<a:graphic><a:graphicData uri="{uri}">{ids}</a:graphicData></a:graphic>'
        place = '<p:xfrm><a:off x="0" y="3000000"/><a:ext cx="9" cy="9"/></p:xfrm>'
        names = '<p:nvGraphicFramePr><p:cNvPr id="9" name="D"/><p:cNvGraphicFramePr/><p:nvPr/></p:nvGraphicFramePr>'
        frame = f"<p:graphicFrame {AS} {PS}>{names}{place}{data}</p:graphicFrame>"
        slide.shapes._spTree.append(parse_xml(frame))

    (draft,) = drafts(Slides((str(saved(tmp_path / "a.pptx", build)),)))
    diagram = "\n\n- Plan\n  - with care\n- Test" if stored else ""
    assert draft.record["text"] == f"# Title{diagram}"
    assert draft.not_read == ({} if stored else {"SmartArt": 1})


def test_damaged_part_rejects_the_file(tmp_path, deck):
    with zipfile.ZipFile(deck) as parts:
        start = parts.getinfo("ppt/slides/slide1.xml").header_offset + 80
    data = bytearray(deck.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    (tmp_path / "damaged.pptx").write_bytes(data)
    drafts, rejected = read(Slides((str(tmp_path / "damaged.pptx"),)))
    assert not drafts
    assert [entry.reason for entry in rejected] == ["unreadable_document"]


def test_dates_of_charts_are_written_as_dates(tmp_path):
    def build(slide):
        sales = CategoryChartData(number_format="0.0")
        sales.categories = [date(2021, 1, 1), date(2021, 2, 1)]
        sales.add_series("sales", (1.5, 2))
        slide.shapes.add_chart(XL_CHART_TYPE.LINE, 0, 0, Inches(4), Inches(3), sales)

    [draft] = drafts(Slides((str(saved(tmp_path / "a.pptx", build)),)))
    assert "| 2021-01-01 | 1.5 |\n| 2021-02-01 | 2 |" in draft.record["text"]


@pytest.mark.parametrize(
    ("omml", "tex"),
    [
        ("<m:sPre><m:sub>6</m:sub><m:sup>14</m:sup><m:e>C</m:e></m:sPre>", "{}_6^{14}C"),
        ('<m:bar><m:barPr><m:pos m:val="top"/></m:barPr><m:e>x</m:e></m:bar>', r"\overline{x}"),
        ('<m:acc><m:accPr><m:chr m:val="\u20d6"/></m:accPr><m:e>x</m:e></m:acc>', "x\u20d6"),
        ('<m:d><m:dPr><m:begChr m:val="{"/><m:endChr m:val=""/></m:dPr><m:e>x</m:e></m:d>', r"\{x"),
    ],
)
def test_structures_of_equations_keep_their_meaning(omml, tex):
    runs = re.sub(r">([^<>]+)<", r"><m:r><m:t>\1</m:t></m:r><", omml)
    space = "http://schemas.openxmlformats.org/officeDocument/2006/math"
    assert tex_of(parse_xml(f'<m:oMath xmlns:m="{space}">{runs}</m:oMath>')) == tex
