"""Slides as interleaved samples: every slide's title, text, tables and pictures in the order in which they are read.

python -m tools.shard build --input talk.pptx --out shards/talk --tokenizer TOKENIZER
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pptx import Presentation
from pptx.enum.shapes import PP_PLACEHOLDER
from pptx.exc import PythonPptxError
from pptx.shapes.group import GroupShape
from pptx.shapes.picture import Picture
from pptx.shapes.placeholder import PlaceholderPicture

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Rejected, Unit
from data_pipeline.inputs.flow import Block, file_units, flow_draft, image_media
from data_pipeline.inputs.names import shown_names
from data_pipeline.media.images import probe_image

MAX_UNPACKED_BYTES = 4 << 30  # of a file's parts together: more is a decompression bomb
_FURNITURE = {PP_PLACEHOLDER.DATE, PP_PLACEHOLDER.FOOTER, PP_PLACEHOLDER.HEADER, PP_PLACEHOLDER.SLIDE_NUMBER}
_TITLES = {PP_PLACEHOLDER.TITLE, PP_PLACEHOLDER.CENTER_TITLE, PP_PLACEHOLDER.VERTICAL_TITLE}


@dataclass(frozen=True)
class Slides:
    """PowerPoint files (.pptx).

    slides_per_sample: so many slides make a sample; 0: the whole deck is one. notes: whether the speaker's notes follow
    each slide. min_side: smaller pictures (logos, bullets), in pixels, are left out.
    """

    paths: tuple[str, ...]
    slides_per_sample: int = 0
    notes: bool = False
    min_side: int = 32

    def __post_init__(self) -> None:
        if self.slides_per_sample < 0:
            raise DataError(
                f"slides_per_sample {self.slides_per_sample}: give a number of slides, or 0 for all of them"
            )

    def units(self) -> Sequence[Unit]:
        return file_units(self.paths)

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        origin = shown_names(self.paths)[unit.path]
        try:
            slides = self._slides(unit.path)
            if not any(blocks for blocks, _ in slides):
                raise BadSample("empty_document", "there is neither text nor a picture in it")
        except BadSample as error:
            yield Rejected(origin, error.reason, error.detail)
            return
        step = self.slides_per_sample or len(slides)
        for first in range(0, len(slides), step):
            run = slides[first : first + step]
            blocks = [block for slide, _ in run for block in slide]
            dropped = sum((count for _, count in run), Counter[str]())
            fields: dict[str, object] = {"dropped_images": dict(sorted(dropped.items()))} if dropped else {}
            place = origin if step >= len(slides) else f"{origin}#slide={first + 1}"
            if blocks:
                yield flow_draft(blocks, place, slides=[first + 1, first + len(run)], **fields)

    def _slides(self, path: str) -> list[tuple[list[Block], Counter[str]]]:
        """Every slide's blocks and the pictures left out of it, by reason. Raises BadSample."""
        _check_container(path)
        try:
            slides = []
            for slide in Presentation(path).slides:
                dropped: Counter[str] = Counter()
                hidden = slide._element.get("show") == "0"
                blocks = [] if hidden else self._blocks(slide.shapes, dropped)
                if self.notes and not hidden and slide.has_notes_slide:
                    frame = slide.notes_slide.notes_text_frame
                    blocks += [frame.text] if frame is not None and frame.text.strip() else []
                slides.append((blocks, dropped))
            return slides
        except (PythonPptxError, KeyError, ValueError, AttributeError, TypeError, OSError, SyntaxError) as error:
            # What python-pptx and lxml raise where a part is missing or is not what it should be.
            raise BadSample("unreadable_document", f"not a presentation, or a damaged one: {error}") from error

    def _blocks(self, shapes: Any, dropped: Counter[str]) -> list[Block]:
        blocks: list[Block] = []
        for shape in sorted(shapes, key=_reading_place):
            if shape.is_placeholder and shape.placeholder_format.type in _FURNITURE:
                continue
            if isinstance(shape, GroupShape):
                blocks += self._blocks(shape.shapes, dropped)
            elif isinstance(shape, Picture | PlaceholderPicture):
                try:
                    media = image_media(_bytes_of(shape))
                    if min(probe_image(media.data)) < self.min_side:
                        raise BadSample("small_image", f"less than {self.min_side} pixels")
                    blocks.append(media)
                except BadSample as error:
                    dropped[error.reason] += 1
            elif shape.has_table:
                blocks.append(_table(shape.table))
            elif shape.has_text_frame and (text := _text(shape)):
                blocks.append(text)
        return blocks


def _check_container(path: str) -> None:
    try:
        with zipfile.ZipFile(path) as container:
            unpacked = sum(info.file_size for info in container.infolist())
            encrypted = any(info.flag_bits & 1 for info in container.infolist())
    except zipfile.BadZipFile as error:
        with open(path, "rb") as file:  # a password turns the file into an OLE container
            if file.read(8) == bytes.fromhex("d0cf11e0a1b11ae1"):
                raise BadSample("encrypted", "it asks for a password, or is an old .ppt: store it as .pptx") from error
        raise BadSample("unreadable_document", f"not a presentation, or a damaged one: {error}") from error
    except OSError as error:
        raise BadSample("missing_file", f"{path}: {error.strerror}") from error
    if encrypted:
        raise BadSample("encrypted", "its parts are encrypted: store it without a password")
    if unpacked > MAX_UNPACKED_BYTES:
        raise BadSample("document_too_large", f"unpacked it would take {unpacked} bytes")


def _reading_place(shape: Any) -> tuple[int, int, int]:
    """The title first, then from top to bottom and from left to right. Tops within half an inch are one row."""
    title = shape.is_placeholder and shape.placeholder_format.type in _TITLES
    return (0 if title else 1, round((shape.top or 0) / 457200), shape.left or 0)


def _bytes_of(shape: Picture | PlaceholderPicture) -> bytes:
    """Raises BadSample `missing_file` for one that lies elsewhere, or whose part is not there."""
    try:
        return shape.image.blob
    except (ValueError, KeyError, AttributeError) as error:
        raise BadSample("missing_file", f"{shape.name} is not in the file: {error}") from error


def _text(shape: Any) -> str:
    """The paragraphs of a shape, lower levels indented; a title as a heading."""
    lines = ["  " * p.level + p.text.replace("\v", "\n").strip() for p in shape.text_frame.paragraphs if p.text.strip()]
    title = shape.is_placeholder and shape.placeholder_format.type in _TITLES
    return f"# {' '.join(line.strip() for line in lines)}" if title and lines else "\n".join(lines)


def _table(table: Any) -> str:
    """Rows of | cells |; cells merged into another are empty."""
    rows = [
        ["" if cell.is_spanned else " ".join(cell.text.split()).replace("|", "\\|") for cell in row.cells]
        for row in table.rows
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if rows and table.first_row:
        lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)
