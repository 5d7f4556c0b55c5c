"""Slides as interleaved samples: the title, text, tables and images of each slide in reading order.

python -m tools.shard build --input talk.pptx --out shards/talk --tokenizer TOKENIZER
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pptx import Presentation
from pptx.enum.shapes import PP_PLACEHOLDER
from pptx.exc import PythonPptxError
from pptx.oxml.ns import qn
from pptx.shapes.graphfrm import GraphicFrame
from pptx.shapes.group import GroupShape
from pptx.shapes.picture import Picture
from pptx.shapes.placeholder import PlaceholderPicture

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.documents.parts import with_file
from data_pipeline.inputs.documents.pptx_graphics import chart_blocks, cropped, diagram_text, table_text
from data_pipeline.inputs.documents.pptx_text import choose_alternatives, paragraph_text
from data_pipeline.inputs.draft import ONE_FILE, Draft, NotRead, Rejected, Unit
from data_pipeline.inputs.flow import Block, file_units, flow_draft, image_media
from data_pipeline.inputs.names import shown_names
from data_pipeline.media.image_files import probe_image

MAX_UNPACKED_BYTES = 4 << 30  # total size of a file's parts: more is a decompression bomb
_NOT_CONTENT = {PP_PLACEHOLDER.DATE, PP_PLACEHOLDER.FOOTER, PP_PLACEHOLDER.HEADER, PP_PLACEHOLDER.SLIDE_NUMBER}
_MEDIA_FILES = {"a:videoFile": "video", "a:audioFile": "audio", "a:wavAudioFile": "audio"}
_FRAMES = {"/chart": "chart", "/chartex": "chart", "/diagram": "SmartArt", "/ole": "OLE object"}  # by the end of a URI
_TITLES = {PP_PLACEHOLDER.TITLE, PP_PLACEHOLDER.CENTER_TITLE, PP_PLACEHOLDER.VERTICAL_TITLE}


@dataclass(frozen=True)
class Slides:
    """PowerPoint files (.pptx)."""

    paths: tuple[str, ...]
    slides_per_sample: int = 0  # 0: one sample per file
    notes: bool = False  # put the speaker's notes after each slide
    min_side: int = 32  # pixels; images with a shorter side (logos, bullets) are dropped

    def __post_init__(self) -> None:
        """Check the options."""
        if self.slides_per_sample < 0:
            raise DataError(
                f"--set slides_per_sample={self.slides_per_sample}: give a number of slides, or 0 for all of them"
            )

    def units(self) -> Sequence[Unit]:
        """Return one unit per file."""
        return file_units(self.paths)

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Return one file and its slides."""
        try:
            return {**ONE_FILE, "slides": len(_opened(unit.path).slides)}
        except BadSample:
            return ONE_FILE

    def read(self, unit: Unit) -> Iterator[Draft | Rejected | NotRead]:
        """Yield the samples of a presentation."""
        origin = shown_names(self.paths)[unit.path]
        try:
            slides = self._slides(unit.path)
            if not any(slide.blocks for slide in slides):
                raise BadSample("empty_document", "it contains neither text nor images")
        except BadSample as error:
            yield Rejected(origin, error.reason, error.detail, self.given(unit))
            return
        yield from with_file(self._samples(slides, origin))

    def _samples(self, slides: Sequence[_Slide], origin: str) -> Iterator[Draft | Rejected | NotRead]:
        step = self.slides_per_sample or len(slides)
        for first in range(0, len(slides), step):
            chosen = slides[first : first + step]
            if hidden := sum(slide.hidden for slide in chosen):
                yield NotRead("hidden slide", hidden, {"slides": hidden})
            shown = [slide for slide in chosen if not slide.hidden]
            blank = sum(not slide.blocks for slide in shown)
            blocks = [block for slide in shown for block in slide.blocks]
            dropped = sum((slide.dropped for slide in shown), Counter[str]())
            not_read = sum((slide.not_read for slide in shown), Counter[str]())
            not_read.update({f"image: {reason}": count for reason, count in dropped.items()})
            fields: dict[str, object] = {"dropped_images": dict(sorted(dropped.items()))} if dropped else {}
            name = origin if step >= len(slides) else f"{origin}#slide={first + 1}"
            if blocks:
                not_read["blank slide"] += blank
                draft = flow_draft(blocks, name, slides=[first + 1, first + len(chosen)], **fields)
                yield replace(draft, items={"slides": len(shown)}, not_read=dict(+not_read))
            elif shown:
                yield NotRead("blank slide", blank, {"slides": blank})
                yield from (NotRead(each, count) for each, count in sorted(not_read.items()))

    def _slides(self, path: str) -> list[_Slide]:
        """Return the content of each slide."""
        presentation = _opened(path)
        try:
            slides = []
            for slide in presentation.slides:
                found = _Slide(hidden=slide._element.get("show") in ("0", "false"))
                if not found.hidden:
                    found.not_read["graphic"] += choose_alternatives(slide._element)
                    found.read(slide.shapes, self.min_side)
                    found.not_read["comment"] += sum("comment" in link.reltype for link in slide.part.rels.values())
                    self._add_notes(slide, found)
                slides.append(found)
            return slides
        except _FAILURES as error:
            raise BadSample("unreadable_document", f"not a presentation, or a damaged one: {error}") from error

    def _add_notes(self, slide: Any, found: _Slide) -> None:
        frame = slide.notes_slide.notes_text_frame if slide.has_notes_slide else None
        if frame is None or not frame.text.strip():
            return
        if self.notes:
            found.blocks.append(frame.text)
        else:
            found.not_read["notes"] += 1


# python-pptx, lxml and zipfile raise these if a part is missing or damaged.
_FAILURES = (
    *(PythonPptxError, LookupError, ValueError, AttributeError, TypeError, OSError, SyntaxError, EOFError),
    *(RuntimeError, zipfile.BadZipFile, zlib.error),  # RuntimeError: too deeply nested, or an unknown compression
)


def _opened(path: str) -> Any:
    """Open a presentation. Raises BadSample."""
    _check_container(path)
    try:
        presentation = Presentation(path)
        len(presentation.slides)
        return presentation
    except _FAILURES as error:
        raise BadSample("unreadable_document", f"not a presentation, or a damaged one: {error}") from error


@dataclass
class _Slide:
    """What is read of one slide."""

    hidden: bool = False
    blocks: list[Block] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)  # images that are not used, by reason
    not_read: Counter[str] = field(default_factory=Counter)  # what else is not read, by name

    def read(self, shapes: Any, min_side: int) -> None:
        """Add the text, tables, charts and images of shapes."""
        for shape in sorted(shapes, key=_reading_position):
            if shape._element.xpath("./*/p:cNvPr[@hidden='1' or @hidden='true']"):
                self.not_read["hidden shape"] += 1
            elif shape.is_placeholder and shape.placeholder_format.type in _NOT_CONTENT:
                self.not_read["date, footer or slide number"] += bool(shape.has_text_frame and shape.text_frame.text)
            elif isinstance(shape, GroupShape):
                self.read(shape.shapes, min_side)
            elif isinstance(shape, Picture | PlaceholderPicture):
                self._add_image(shape, min_side)
            elif shape._element.tag == qn("p:pic"):  # a video or sound
                names = (name for tag, name in _MEDIA_FILES.items() if shape._element.find(f".//{qn(tag)}") is not None)
                self.not_read[next(names, "video")] += 1
            elif isinstance(shape, GraphicFrame):
                self._add_frame(shape, min_side)
            elif shape.has_text_frame and (text := _text(shape)):
                self.blocks.append(text)
            if shape._element.find(f"{qn('p:spPr')}/{qn('a:blipFill')}") is not None:
                self.not_read["image: fill of a shape"] += 1

    def _add_image(self, shape: Any, min_side: int) -> None:
        try:
            sides = (shape.crop_left, shape.crop_top, shape.crop_right, shape.crop_bottom)
            media = cropped(image_media(_bytes_of(shape)), sides)
            if min(probe_image(media.data)) < min_side:
                raise BadSample("small_image", f"a side is shorter than {min_side} pixels")
            self.blocks.append(media)
        except BadSample as error:
            self.dropped[error.reason] += 1

    def _add_frame(self, shape: GraphicFrame, min_side: int) -> None:
        """Add a table, a chart or the text of a diagram, or count what the frame holds."""
        if shape.has_table:
            self.blocks.append(_table(shape.table))
            return
        data = shape._element.find(f".//{qn('a:graphicData')}")
        kind = str(data.get("uri", "")) if data is not None else ""
        found: list[str] = []
        with contextlib.suppress(*_FAILURES):  # a part that is missing or damaged
            if shape.has_chart:
                found = chart_blocks(shape.chart._chartSpace)
            elif kind.endswith("/diagram"):
                found = [diagram_text(shape._element, shape.part)]
        self.blocks += [block for block in found if block]
        if not any(found):
            self.not_read[next((name for end, name in _FRAMES.items() if kind.endswith(end)), "graphic")] += 1


def _check_container(path: str) -> None:
    """Raise BadSample if the file is not a ZIP archive, is encrypted or unpacks to too many bytes."""
    try:
        with zipfile.ZipFile(path) as container:
            unpacked = sum(info.file_size for info in container.infolist())
            encrypted = any(info.flag_bits & 1 for info in container.infolist())
    except zipfile.BadZipFile as error:
        with open(path, "rb") as file:  # a .pptx with a password is an OLE container, as an old .ppt is
            if file.read(8) == bytes.fromhex("d0cf11e0a1b11ae1"):
                raise BadSample(
                    "encrypted", "it asks for a password, or is an old .ppt: save it as .pptx without one"
                ) from error
        raise BadSample("unreadable_document", f"not a presentation, or a damaged one: {error}") from error
    except OSError as error:
        raise BadSample("missing_file", f"{path}: {error.strerror}") from error
    except _FAILURES as error:
        raise BadSample("unreadable_document", f"not a presentation, or a damaged one: {error}") from error
    if encrypted:
        raise BadSample("encrypted", "its parts are encrypted: save it without a password")
    if unpacked > MAX_UNPACKED_BYTES:
        raise BadSample("document_too_large", f"it unpacks to {unpacked:,} bytes, more than {MAX_UNPACKED_BYTES:,}")


def _reading_position(shape: Any) -> tuple[int, int, int]:
    """Return a sort key: the title first, then rows of half an inch from top to bottom, each from left to right."""
    title = shape.is_placeholder and shape.placeholder_format.type in _TITLES
    return (0 if title else 1, round((shape.top or 0) / 457200), shape.left or 0)


def _bytes_of(shape: Picture | PlaceholderPicture) -> bytes:
    """Return an image file. Raises BadSample `missing_file` if it is linked, or its part is missing."""
    try:
        return shape.image.blob
    except (ValueError, KeyError, AttributeError) as error:
        raise BadSample("missing_file", f"{shape.name} is not in the file: {error}") from error


def _text(shape: Any) -> str:
    """Return the paragraphs of a shape, indented by level; a title becomes a heading."""
    texts = [(p.level, paragraph_text(p._p)) for p in shape.text_frame.paragraphs]
    lines = ["  " * level + text.replace("\v", "\n").strip() for level, text in texts if text.strip()]
    title = shape.is_placeholder and shape.placeholder_format.type in _TITLES
    return f"# {' '.join(line.strip() for line in lines)}" if title and lines else "\n".join(lines)


def _table(table: Any) -> str:
    """Return a Markdown table. Cells that are merged into another are empty."""
    rows = [
        [
            "" if cell.is_spanned else " ".join(paragraph_text(p._p) for p in cell.text_frame.paragraphs)
            for cell in row.cells
        ]
        for row in table.rows
    ]
    return table_text(rows, header=bool(table.first_row))
