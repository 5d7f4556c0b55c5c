"""Pictures with the words in them: text of real scenes, for the OCR domain.

Words come with their boxes or polygons, in JSON lines or as ICDAR writes them, a text file beside each picture:

    {"image": "street.jpg", "words": [{"text": "STOP", "box": [40, 20, 90, 38]},
                                      {"text": "Main St", "polygon": [[5, 60], [70, 52], [71, 66], [6, 74]]}]}

    street.jpg, gt_street.txt (or street.txt):      40,20,90,20,90,38,40,38,STOP

They are put in reading order: words that share a line from left to right (from right to left in a script written so),
lines from top to bottom. The sample's text is those lines, or with `form=boxes` a word and its box a line:

    STOP                        STOP [[80,50,180,95]]
    Main St                     Main St [[10,130,142,185]]
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Rejected, Unit
from data_pipeline.inputs.media import read_whole
from data_pipeline.inputs.names import as_stored, files_below
from data_pipeline.inputs.records.annotations import IMAGE_BYTES, AnnotatedImage, line_units, read_image, read_objects
from data_pipeline.media.boxes import Box, bounding_box, checked_box, read_box, to_thousandths, write_boxes
from data_pipeline.shards.members import IMAGE_EXTENSIONS

ILLEGIBLE = ("", "#", "###", "*")  # what the ICDAR sets write where nobody could read a word


@dataclass(frozen=True)
class Word:
    text: str
    box: Box  # pixels


@dataclass(frozen=True)
class SceneText:
    """JSON-lines files of words, and folders of pictures with an ICDAR file each.

    images: the folder that the names in JSON lines are relative to; empty: the file's own. form: text or boxes.
    """

    paths: tuple[str, ...]
    images: str = ""
    form: Literal["text", "boxes"] = "text"

    def units(self) -> Sequence[Unit]:
        units: list[Unit] = []
        for path in self.paths:
            units += _icdar_units(path) if Path(path).is_dir() else line_units(path, bytes_per_line=IMAGE_BYTES)
        return units

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        for origin, found in _pictures(unit, self.images):
            try:
                if isinstance(found, BadSample):
                    raise found
                picture = read_image(found.get("image"), Path(found["folder"]))
                yield from self._sample(origin, picture, found.get("words"))
            except BadSample as error:
                yield Rejected(origin, error.reason, error.detail)

    def _sample(self, origin: str, picture: AnnotatedImage, given: Any) -> Iterator[Draft | Rejected]:
        if not isinstance(given, list):
            raise BadSample("bad_record", 'a line needs a list of "words"')
        words: list[Word] = []
        for number, word in enumerate(given):
            try:
                if read := _word(word, picture):
                    words.append(read)
            except BadSample as error:
                yield Rejected(f"{origin} word {number}", error.reason, error.detail)
        if not words:
            raise BadSample("no_text", "the picture has no legible word with a valid box")
        lines = reading_order(words)
        if self.form == "text":
            text = "\n".join(joined(line) for line in lines)
        else:
            text = "\n".join(
                f"{word.text} {write_boxes([to_thousandths(word.box, picture.width, picture.height)])}"
                for line in lines
                for word in line
            )
        yield Draft({"domain": "ocr", "text": text}, [picture.media], origin=origin)


def reading_order(words: Sequence[Word]) -> list[list[Word]]:
    """Words -> lines. A word joins the line above it whose first word it overlaps by half of the lower of the two."""
    lines: list[list[Word]] = []
    for word in sorted(words, key=lambda word: (word.box[1] + word.box[3], word.box[0])):
        line = next((line for line in reversed(lines) if _level(line[0], word)), None)
        if line is None:
            lines.append([word])
        else:
            line.append(word)
    return [sorted(line, key=lambda word: word.box[0], reverse=_runs_leftward(line)) for line in lines]


def joined(line: Sequence[Word]) -> str:
    """The words of a line with a space between them, except where both neighbours are written without any."""
    text = line[0].text
    for word in line[1:]:
        text += word.text if _wide(text[-1]) and _wide(word.text[0]) else f" {word.text}"
    return text


def _level(first: Word, second: Word) -> bool:
    shared = min(first.box[3], second.box[3]) - max(first.box[1], second.box[1])
    return shared >= 0.5 * min(first.box[3] - first.box[1], second.box[3] - second.box[1])


def _runs_leftward(line: Sequence[Word]) -> bool:
    kinds = [unicodedata.bidirectional(letter) for word in line for letter in word.text]
    return sum(kind in ("R", "AL") for kind in kinds) > kinds.count("L")


def _wide(letter: str) -> bool:
    return unicodedata.east_asian_width(letter) in "WF" and not "\uac00" <= letter <= "\ud7a3"  # Hangul has spaces


def _word(word: Any, picture: AnnotatedImage) -> Word | None:
    """An annotated word; None where nobody could read it. Raises BadSample."""
    if not isinstance(word, dict) or not isinstance(word.get("text"), str):
        raise BadSample("bad_record", 'a word needs "text" and a "box" or "polygon"')
    text = " ".join(word["text"].split())
    if text in ILLEGIBLE:
        return None
    if "polygon" in word:
        points = word["polygon"]
        if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
            raise BadSample("bad_box", "a polygon is a list of [x, y]")
        corners = [value for point in points for value in point]
        if len(points) < 3 or not all(isinstance(value, (int, float)) and abs(value) < 1e9 for value in corners):
            raise BadSample("bad_box", "a polygon has three corners or more, all of them numbers")
        box = checked_box(bounding_box(points), picture.width, picture.height)
    else:
        box = read_box(word.get("box"), "xyxy", picture.width, picture.height)
    to_thousandths(box, picture.width, picture.height)  # too thin a box is no box in either form
    return Word(text, box)


# --- ICDAR ------------------------------------------------------------------------------------------------------------


def _icdar_units(folder: str) -> list[Unit]:
    """One unit a text file whose picture is there: gt_NAME.txt or NAME.txt. Raises DataError if there is none."""
    units = []
    for truth in sorted(path for path in files_below(Path(folder)) if path.suffix.lower() == ".txt"):
        for extension in IMAGE_EXTENSIONS:
            picture = Path(as_stored(str(truth.with_name(f"{truth.stem.removeprefix('gt_')}.{extension}"))))
            if picture.is_file():
                units.append(Unit(str(truth), bytes=IMAGE_BYTES, extra={"image": picture.name}))
                break
    if not units:
        raise DataError(f"{folder} holds no picture with its gt_NAME.txt: give such a folder, or JSON lines")
    return units


def _pictures(unit: Unit, images: str) -> Iterator[tuple[str, dict[str, Any] | BadSample]]:
    """(origin, {"image", "words", "folder"}) of every picture of a unit."""
    if "image" in unit.extra:
        truth = Path(unit.path)
        record = {"image": unit.extra["image"], "folder": truth.parent}
        try:
            yield truth.name, {**record, "words": [*map(_icdar_word, filter(str.strip, _decoded(truth).splitlines()))]}
        except BadSample as error:
            yield truth.name, error
        return
    for origin, found in read_objects(unit):
        yield origin, found if isinstance(found, BadSample) else {**found, "folder": images or Path(unit.path).parent}


def _decoded(path: Path) -> str:
    try:
        return read_whole(path.name, path.parent).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("bad_record", f"{path.name}: {error}") from error


def _icdar_word(line: str) -> dict[str, Any] | None:
    """ "x1,y1,x2,y2,x3,y3,x4,y4,transcription" -> a word; None, which is no word, for a line of another form."""
    parts = line.split(",", 8)
    try:
        numbers = [float(part) for part in parts[:8]]
    except ValueError:
        return None
    if len(parts) < 9:
        return None
    return {"text": parts[8], "polygon": [[x, y] for x, y in zip(numbers[::2], numbers[1::2], strict=True)]}
