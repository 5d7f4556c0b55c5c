"""Slides as interleaved samples: the title, text, tables and images of each slide in reading order.

python -m tools.shard build --input talk.pptx --out shards/talk --tokenizer TOKENIZER
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pptx import Presentation
from pptx.enum.shapes import PP_PLACEHOLDER
from pptx.exc import PythonPptxError
from pptx.shapes.group import GroupShape
from pptx.shapes.picture import Picture
from pptx.shapes.placeholder import PlaceholderPicture

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import ONE_FILE, Draft, Rejected, Unit, credited
from data_pipeline.inputs.flow import Block, file_units, flow_draft, image_media
from data_pipeline.inputs.names import shown_names
from data_pipeline.media.image_files import probe_image

MAX_UNPACKED_BYTES = 4 << 30  # total size of a file's parts: more is a decompression bomb
_NOT_CONTENT = {PP_PLACEHOLDER.DATE, PP_PLACEHOLDER.FOOTER, PP_PLACEHOLDER.HEADER, PP_PLACEHOLDER.SLIDE_NUMBER}
_TITLES = {PP_PLACEHOLDER.TITLE, PP_PLACEHOLDER.CENTER_TITLE, PP_PLACEHOLDER.VERTICAL_TITLE}


@dataclass(frozen=True)
class Slides:
    """PowerPoint files (.pptx)."""

    paths: tuple[str, ...]
    slides_per_sample: int = 0  # 0: one sample per file
    notes: bool = False  # put the speaker's notes after each slide
    min_side: int = 32  # pixels; images with a shorter side (logos, bullets) are skipped

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
        """Return one file."""
        return ONE_FILE

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        """Yield the samples of a presentation."""
        return credited(self._read(unit), ONE_FILE)

    def _read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        origin = shown_names(self.paths)[unit.path]
        try:
            slides = self._slides(unit.path)
            if not any(blocks for blocks, _ in slides):
                raise BadSample("empty_document", "it contains neither text nor images")
        except BadSample as error:
            yield Rejected(origin, error.reason, error.detail)
            return
        step = self.slides_per_sample or len(slides)
        for first in range(0, len(slides), step):
            chosen = slides[first : first + step]
            blocks = [block for slide, _ in chosen for block in slide]
            skipped = sum((count for _, count in chosen), Counter[str]())
            fields: dict[str, object] = {"dropped_images": dict(sorted(skipped.items()))} if skipped else {}
            name = origin if step >= len(slides) else f"{origin}#slide={first + 1}"
            if blocks:
                yield flow_draft(blocks, name, slides=[first + 1, first + len(chosen)], **fields)

    def _slides(self, path: str) -> list[tuple[list[Block], Counter[str]]]:
        """Return each slide's blocks, and the number of its skipped images by reason."""
        _check_container(path)
        try:
            slides = []
            for slide in Presentation(path).slides:
                skipped: Counter[str] = Counter()
                hidden = slide._element.get("show") == "0"
                blocks = [] if hidden else self._blocks(slide.shapes, skipped)
                if self.notes and not hidden and slide.has_notes_slide:
                    frame = slide.notes_slide.notes_text_frame
                    blocks += [frame.text] if frame is not None and frame.text.strip() else []
                slides.append((blocks, skipped))
            return slides
        except (PythonPptxError, KeyError, ValueError, AttributeError, TypeError, OSError, SyntaxError) as error:
            # python-pptx and lxml raise these if a part is missing or damaged.
            raise BadSample("unreadable_document", f"not a presentation, or a damaged one: {error}") from error

    def _blocks(self, shapes: Any, skipped: Counter[str]) -> list[Block]:
        """Return the text and images of shapes, and count skipped images by reason in `skipped`."""
        blocks: list[Block] = []
        for shape in sorted(shapes, key=_reading_position):
            if shape.is_placeholder and shape.placeholder_format.type in _NOT_CONTENT:
                continue
            if isinstance(shape, GroupShape):
                blocks += self._blocks(shape.shapes, skipped)
            elif isinstance(shape, Picture | PlaceholderPicture):
                try:
                    media = image_media(_bytes_of(shape))
                    if min(probe_image(media.data)) < self.min_side:
                        raise BadSample("small_image", f"a side is shorter than {self.min_side} pixels")
                    blocks.append(media)
                except BadSample as error:
                    skipped[error.reason] += 1
            elif shape.has_table:
                blocks.append(_table(shape.table))
            elif shape.has_text_frame and (text := _text(shape)):
                blocks.append(text)
        return blocks


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
    lines = ["  " * p.level + p.text.replace("\v", "\n").strip() for p in shape.text_frame.paragraphs if p.text.strip()]
    title = shape.is_placeholder and shape.placeholder_format.type in _TITLES
    return f"# {' '.join(line.strip() for line in lines)}" if title and lines else "\n".join(lines)


def _table(table: Any) -> str:
    """Return a Markdown table. Cells that are merged into another are empty."""
    rows = [
        ["" if cell.is_spanned else " ".join(cell.text.split()).replace("|", "\\|") for cell in row.cells]
        for row in table.rows
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if rows and table.first_row:
        lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)
