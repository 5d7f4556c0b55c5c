r"""Text files rendered to images, for the OCR domain: real fonts, random sizes, colours and backgrounds.

A sample's text is what its image shows, line by line. Option `layout` has three values: `line`, one line; `paragraph`,
one paragraph, or as much of it as fits in twelve lines; `page`, paragraphs with a blank line between them. The record
also contains the bounding box of each line's glyphs, in pixels:

    {"domain": "ocr", "text": "The quick brown\nfox jumps.", "line_boxes": [[12, 9, 151, 27], [12, 35, 98, 53]]}

The images depend on the text, the seed, the options and the fonts alone. Give a folder of fonts to get the same images
on another machine.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import MATERIAL, Draft, Rejected, Unit
from data_pipeline.inputs.names import files_below
from data_pipeline.inputs.ocr.compositing import Compositing, compose
from data_pipeline.inputs.ocr.fonts import Face, can_shape, choose_face, code_points, find_faces, needs_shaping
from data_pipeline.inputs.ocr.typesetting import Line, clean, draw_lines, runs_leftward, wrap
from data_pipeline.shards.members import IMAGE_EXTENSIONS

TEXT_BYTES_PER_UNIT = 1 << 16
IMAGE_BYTES_PER_TEXT_BYTE = 100  # approximate
_MAX_LINE_SEARCH = 1 << 12  # bytes after a cut in which the end of a line is searched


@dataclass(frozen=True)
class PageStyle:
    """The ranges from which the geometry of an image is drawn."""

    width: tuple[float, float]  # of a line, in ems
    lines: tuple[int, int]  # of which one number is drawn: the most lines of the image
    paragraphs: int  # at most
    margin: tuple[float, float]  # in ems
    full_height: bool = False  # as high as the most lines need, even if there are fewer


PAGE_STYLES = {
    "line": PageStyle(width=(6, 40), lines=(1, 1), paragraphs=1, margin=(0.2, 1.5)),
    "paragraph": PageStyle(width=(14, 40), lines=(12, 12), paragraphs=1, margin=(0.3, 2.5)),
    "page": PageStyle(width=(28, 46), lines=(24, 48), paragraphs=1000, margin=(2.0, 5.0), full_height=True),
}


@dataclass(frozen=True)
class RenderedText:
    """UTF-8 text files, and folders of them (*.txt). Every line of a file is a paragraph."""

    paths: tuple[str, ...]
    layout: Literal["line", "paragraph", "page"] = "paragraph"
    seed: int = 0
    fonts: str = field(default="", metadata=MATERIAL)  # a folder; empty: the fonts of the system
    min_font_size: int = 14  # pixels per em
    max_font_size: int = 40  # pixels per em
    backgrounds: str = field(default="", metadata=MATERIAL)  # a folder of images to draw on, besides generated ones
    contrast: float = 3.0  # least WCAG contrast ratio of the text with every pixel of its background
    max_rotation: float = 2.0  # degrees, in either direction
    max_blur: float = 0.8  # radius in pixels
    min_quality: int = 50  # of JPEG; the greatest is 95
    image_format: Literal["jpg", "png"] = "jpg"

    def __post_init__(self) -> None:
        """Check the options."""
        for option, value, least, most in (
            ("min_font_size", self.min_font_size, 6, self.max_font_size),
            ("max_font_size", self.max_font_size, 6, 400),
            ("contrast", self.contrast, 1, 15),
            ("max_rotation", self.max_rotation, 0, 45),
            ("max_blur", self.max_blur, 0, 10),
            ("min_quality", self.min_quality, 1, 95),
        ):
            if not least <= value <= most:
                raise DataError(f"--set {option}={value}: give a value from {least} to {most}")

    def units(self) -> Sequence[Unit]:
        """Return units of TEXT_BYTES_PER_UNIT bytes of text."""
        find_faces(self.fonts)
        files = [file for path in self.paths for file in _text_files(Path(path))]
        return [
            Unit(str(file), start, stop, bytes=IMAGE_BYTES_PER_TEXT_BYTE * (stop - start))
            for file in files
            for size in [file.stat().st_size]
            for start in range(0, size, TEXT_BYTES_PER_UNIT)
            for stop in [min(start + TEXT_BYTES_PER_UNIT, size)]
        ]

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the paragraphs that are not blank."""
        return {"paragraphs": sum(1 for _ in paragraphs_of(unit))}

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        """Yield the samples of a unit: one per image."""
        name = Path(unit.path).name
        faces = find_faces(self.fonts)
        paragraphs: deque[str] = deque()
        for origin, paragraph in paragraphs_of(unit):
            if isinstance(paragraph, BadSample):
                yield Rejected(origin, paragraph.reason, paragraph.detail, {"paragraphs": 1})
            else:
                paragraphs.append(paragraph)
        number = 0
        while paragraphs:
            rng = random.Random(f"{self.seed}:{name}:{unit.start}:{number}")
            origin = f"{name}@{unit.start} image {number}"
            number += 1
            try:
                face = _face_of(paragraphs[0], faces, rng)
            except BadSample as error:
                detail = f"{error.detail}: {paragraphs.popleft()[:60]!r}"
                yield Rejected(origin, error.reason, detail, {"paragraphs": 1})
                continue
            before = len(paragraphs)
            try:
                draft = self._draw(paragraphs, face, rng, origin)
                yield replace(draft, items={"paragraphs": before - len(paragraphs)})
            except BadSample as error:
                yield Rejected(origin, error.reason, error.detail, {"paragraphs": before - len(paragraphs)})

    def _draw(self, paragraphs: deque[str], face: Face, rng: random.Random, origin: str) -> Draft:
        """Remove from the paragraphs what fits on one image, and draw it. The order of random draws is fixed."""
        style = PAGE_STYLES[self.layout]
        size = rng.randint(self.min_font_size, self.max_font_size)
        font = face.at(size)
        pitch = round(sum(font.getmetrics()) * rng.uniform(1.0, 1.5))
        width = size * rng.uniform(*style.width)
        max_lines = rng.randint(*style.lines)
        leftward = runs_leftward(paragraphs[0])
        lines = _take_lines(paragraphs, face, style.paragraphs, max_lines, lambda text: wrap(text, font, width))

        sides: tuple[Literal["left", "centre", "right"], ...] = ("left", "left", "left", "centre", "right")
        align = "right" if leftward else rng.choice(sides)
        text = draw_lines(lines, font, pitch=pitch, align=align, height=max_lines * pitch if style.full_height else 0)
        options = Compositing(
            margin=round(size * rng.uniform(*style.margin)),
            angle=rng.uniform(-self.max_rotation, self.max_rotation),
            contrast=self.contrast,
            blur=rng.uniform(0, self.max_blur),
            quality=rng.randint(self.min_quality, 95) if self.image_format == "jpg" else None,
            backgrounds=_background_images(self.backgrounds),
        )
        media, boxes = compose(text, options, rng)
        record: dict[str, Any] = {
            "domain": "ocr",
            "text": "\n".join(lines),
            "line_boxes": [list(box) for box in boxes],
            "font": f"{Path(face.path).name}#{face.index}",
            "font_size": size,
        }
        return Draft(record, [media], origin=origin)


def _take_lines(
    paragraphs: deque[str], face: Face, max_paragraphs: int, max_lines: int, wrapped: Callable[[str], Iterable[Line]]
) -> list[str]:
    """Remove lines from the first paragraphs while the face can draw them and they run in the same direction.

    The rest of the last paragraph stays.
    """
    lines: list[str] = []
    leftward = runs_leftward(paragraphs[0])
    for _ in range(min(max_paragraphs, len(paragraphs))):
        text = paragraphs[0]
        free = max_lines - len(lines) - bool(lines)
        if free < 1 or runs_leftward(text) != leftward or not face.covers(code_points(text)):
            break
        taken = list(islice(wrapped(text), free))
        lines += [*([""] if lines else []), *(line for line, _ in taken)]
        paragraphs.popleft()
        if rest := text[taken[-1][1] :].lstrip():
            paragraphs.appendleft(rest)
    return lines


def _face_of(paragraph: str, faces: Sequence[Face], rng: random.Random) -> Face:
    if needs_shaping(paragraph) and not can_shape():
        raise BadSample("needs_shaping", "Pillow needs raqm to draw this script correctly: install libraqm")
    return choose_face(faces, paragraph, rng)


def _text_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in files_below(path) if file.suffix.lower() == ".txt")
    if not files:
        raise DataError(f"{path} contains no text files (*.txt): give text files, or a folder of them")
    return files


def paragraphs_of(unit: Unit) -> Iterator[tuple[str, str | BadSample]]:
    """Yield the origin and text of each paragraph of a unit, or why it cannot be read.

    A paragraph belongs to the unit in which it begins. A very long line is divided between units.
    """
    name = Path(unit.path).name
    with open(unit.path, "rb") as file:
        begin = _line_boundary(file, unit.start)
        end = _line_boundary(file, unit.stop)
        file.seek(begin)
        lines = file.read(max(end - begin, 0)).split(b"\n")
    for number, line in enumerate(lines):
        origin = f"{name}@{begin} line {number}"
        try:
            text = clean(line.decode("utf-8-sig" if begin == 0 and number == 0 else "utf-8"))
        except UnicodeDecodeError as error:
            yield origin, BadSample("bad_text", f"not UTF-8: {error}")
            continue
        if text:
            yield origin, text


def _line_boundary(file: Any, offset: int) -> int:
    """Return where a unit that is cut at this byte ends. The two units that meet there compute the same boundary.

    It is the end of the line that contains the byte, if that is near, else the start of the next character.
    """
    if offset == 0:
        return 0
    file.seek(offset - 1)
    near = file.read(_MAX_LINE_SEARCH)
    found = near.find(b"\n")
    if found >= 0:
        return offset + found
    return offset + next((ahead for ahead, byte in enumerate(near[1:]) if byte & 0xC0 != 0x80), len(near) - 1)


@lru_cache(maxsize=4)
def _background_images(folder: str) -> tuple[str, ...]:
    """Return the images in a folder; none if `folder` is "". Raises DataError if the folder contains none."""
    if not folder:
        return ()
    suffixes = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
    found = tuple(sorted(str(path) for path in files_below(Path(folder)) if path.name.lower().endswith(suffixes)))
    if not found:
        raise DataError(f"--set backgrounds={folder}: the folder contains no images")
    return found
