"""Text files as pictures of text, for the OCR domain: real fonts, and everything else drawn by lot.

A sample's text is what its picture shows, line for line. Three layouts: `line`, one line; `paragraph`, one paragraph,
or as much of it as twelve lines hold; `page`, paragraphs down a page, with a blank line between them. The record also
says where the ink of each line lies, in pixels:

    {"domain": "ocr", "text": "The quick brown\nfox jumps.", "line_boxes": [[12, 9, 151, 27], [12, 35, 98, 53]]}

What is drawn depends on the text, the seed, the options and the fonts alone: name a folder of fonts where the same
pictures must come out on another machine.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import MATERIAL, Draft, Rejected, Unit
from data_pipeline.inputs.names import files_below
from data_pipeline.inputs.ocr.compositing import Scenery, compose
from data_pipeline.inputs.ocr.fonts import Face, can_shape, choose_face, code_points, find_faces, needs_shaping
from data_pipeline.inputs.ocr.typesetting import Line, clean, leftward, set_lines, wrap
from data_pipeline.shards.members import IMAGE_EXTENSIONS

TEXT_A_UNIT = 1 << 16  # bytes
PICTURE_BYTES_A_LETTER = 100  # roughly
_SEARCHED = 1 << 12  # how far after its place a cut looks for the end of a line


@dataclass(frozen=True)
class Layout:
    """width: of a line, in ems, least and most; lines and paragraphs: most of each; margin: in ems, least and most;
    full: pages are equally high, however little stands on the last."""

    width: tuple[float, float]
    lines: tuple[int, int]
    paragraphs: int
    margin: tuple[float, float]
    full: bool = False


LAYOUTS = {
    "line": Layout(width=(6, 40), lines=(1, 1), paragraphs=1, margin=(0.2, 1.5)),
    "paragraph": Layout(width=(14, 40), lines=(12, 12), paragraphs=1, margin=(0.3, 2.5)),
    "page": Layout(width=(28, 46), lines=(24, 48), paragraphs=1000, margin=(2.0, 5.0), full=True),
}


@dataclass(frozen=True)
class RenderedText:
    """Text files in UTF-8, and folders of them (*.txt); every line of a file is a paragraph.

    fonts: a folder; empty: the system's. backgrounds: a folder of pictures to draw on, beside plain, graded and noisy
    grounds. contrast: least WCAG contrast ratio of the ink with every pixel under it. max_rotation: degrees;
    max_blur: pixels; min_quality: of JPEG, of which the best is 95. image_format: png loses nothing.
    """

    paths: tuple[str, ...]
    layout: Literal["line", "paragraph", "page"] = "paragraph"
    seed: int = 0
    fonts: str = field(default="", metadata=MATERIAL)
    min_font_size: int = 14
    max_font_size: int = 40
    backgrounds: str = field(default="", metadata=MATERIAL)
    contrast: float = 3.0
    max_rotation: float = 2.0
    max_blur: float = 0.8
    min_quality: int = 50
    image_format: Literal["jpg", "png"] = "jpg"

    def __post_init__(self) -> None:
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
        find_faces(self.fonts)
        files = [file for path in self.paths for file in _text_files(Path(path))]
        return [
            Unit(str(file), start, min(start + TEXT_A_UNIT, size), bytes=PICTURE_BYTES_A_LETTER * (stop - start))
            for file in files
            for size in [file.stat().st_size]
            for start in range(0, size, TEXT_A_UNIT)
            for stop in [min(start + TEXT_A_UNIT, size)]
        ]

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        name = Path(unit.path).name
        faces = find_faces(self.fonts)
        paragraphs: deque[str] = deque()
        for origin, paragraph in paragraphs_of(unit):
            if isinstance(paragraph, BadSample):
                yield Rejected(origin, paragraph.reason, paragraph.detail)
            else:
                paragraphs.append(paragraph)
        number = 0
        while paragraphs:
            lot = random.Random(f"{self.seed}:{name}:{unit.start}:{number}")
            origin = f"{name}@{unit.start} picture {number}"
            number += 1
            try:
                face = _face_of(paragraphs[0], faces, lot)
            except BadSample as error:
                yield Rejected(origin, error.reason, f"{error.detail}: {paragraphs.popleft()[:60]!r}")
                continue
            try:
                yield self._draw(paragraphs, face, lot, origin)
            except BadSample as error:
                yield Rejected(origin, error.reason, error.detail)

    def _draw(self, paragraphs: deque[str], face: Face, lot: random.Random, origin: str) -> Draft:
        """Takes from the paragraphs what goes onto one picture, and draws it."""
        layout = LAYOUTS[self.layout]
        size = lot.randint(self.min_font_size, self.max_font_size)
        font = face.at(size)
        pitch = round(sum(font.getmetrics()) * lot.uniform(1.0, 1.5))
        width = size * lot.uniform(*layout.width)
        most = lot.randint(*layout.lines)
        runs_leftward = leftward(paragraphs[0])
        lines = _fill(paragraphs, face, layout.paragraphs, most, lambda text: wrap(text, font, width))

        sides: tuple[Literal["left", "centre", "right"], ...] = ("left", "left", "left", "centre", "right")
        align = "right" if runs_leftward else lot.choice(sides)
        block = set_lines(lines, font, pitch=pitch, align=align, height=most * pitch if layout.full else 0)
        scenery = Scenery(
            margin=round(size * lot.uniform(*layout.margin)),
            angle=lot.uniform(-self.max_rotation, self.max_rotation),
            contrast=self.contrast,
            blur=lot.uniform(0, self.max_blur),
            quality=lot.randint(self.min_quality, 95) if self.image_format == "jpg" else None,
            pictures=_pictures(self.backgrounds),
        )
        media, boxes = compose(block, scenery, lot)
        record: dict[str, Any] = {"domain": "ocr", "text": "\n".join(lines), "line_boxes": [list(box) for box in boxes]}
        return Draft(
            {**record, "font": f"{Path(face.path).name}#{face.index}", "font_size": size}, [media], origin=origin
        )


def _fill(
    paragraphs: deque[str], face: Face, most_paragraphs: int, most_lines: int, wrapped: Callable[[str], Iterable[Line]]
) -> list[str]:
    """Takes lines from the first paragraphs, as long as the face can draw them and they run the same way; what is left
    of the last one stays."""
    lines: list[str] = []
    runs_leftward = leftward(paragraphs[0])
    for _ in range(min(most_paragraphs, len(paragraphs))):
        text = paragraphs[0]
        room = most_lines - len(lines) - bool(lines)
        if room < 1 or leftward(text) != runs_leftward or not face.covers(code_points(text)):
            break
        taken = list(islice(wrapped(text), room))
        lines += [*([""] if lines else []), *(line for line, _ in taken)]
        paragraphs.popleft()
        if rest := text[taken[-1][1] :].lstrip():
            paragraphs.appendleft(rest)
    return lines


def _face_of(paragraph: str, faces: Sequence[Face], lot: random.Random) -> Face:
    if needs_shaping(paragraph) and not can_shape():
        raise BadSample("needs_shaping", "this script is drawn rightly only where Pillow has raqm: install libraqm")
    return choose_face(faces, paragraph, lot)


def _text_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in files_below(path) if file.suffix.lower() == ".txt")
    if not files:
        raise DataError(f"{path} holds no text files (*.txt): give files, or a folder of such")
    return files


def paragraphs_of(unit: Unit) -> Iterator[tuple[str, str | BadSample]]:
    """The paragraphs that begin in a unit, or that a cut in the middle of a very long line leaves in it."""
    name = Path(unit.path).name
    with open(unit.path, "rb") as file:
        begin = _cut(file, unit.start)
        end = _cut(file, unit.stop)
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


def _cut(file: Any, place: int) -> int:
    """Where a cut at this byte really goes: to the end of the line that it falls into, if that is near, else to the
    next character. Units that meet there agree without knowing of each other."""
    if place == 0:
        return 0
    file.seek(place - 1)
    near = file.read(_SEARCHED)
    found = near.find(b"\n")
    if found >= 0:
        return place + found
    return place + next((offset for offset, byte in enumerate(near[1:]) if byte & 0xC0 != 0x80), len(near) - 1)


@lru_cache(maxsize=4)
def _pictures(folder: str) -> tuple[str, ...]:
    """The pictures to draw on. Raises DataError if a folder is named that holds none."""
    if not folder:
        return ()
    suffixes = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
    found = tuple(sorted(str(path) for path in files_below(Path(folder)) if path.name.lower().endswith(suffixes)))
    if not found:
        raise DataError(f"--set backgrounds={folder}: the folder holds no pictures")
    return found
