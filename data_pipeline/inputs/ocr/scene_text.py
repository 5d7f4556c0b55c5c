"""Images with the words in them: text of real scenes, for the OCR domain.

Words have boxes or polygons. They are read from JSON lines, or from ICDAR text files beside the images:

    {"image": "street.jpg", "words": [{"text": "STOP", "box": [40, 20, 90, 38]},
                                      {"text": "Main St", "polygon": [[5, 60], [70, 52], [71, 66], [6, 74]]}]}

    street.jpg, gt_street.txt (or street.txt):      40,20,90,20,90,38,40,38,STOP

Words are put in reading order: lines from top to bottom, and words in a line from left to right (from right to left in
scripts that run this way). The sample's text is these lines, or with `form=boxes` one word and its box per line:

    STOP                        STOP [[80,50,180,95]]
    Main St                     Main St [[10,130,142,185]]
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import ONE_RECORD, Draft, NotRead, Rejected, Unit
from data_pipeline.inputs.media import read_whole
from data_pipeline.inputs.names import as_stored, count_by_suffix, files_below
from data_pipeline.inputs.records.annotations import (
    IMAGE_BYTES,
    NAMES_CHECKED,
    AnnotatedImage,
    check_folder,
    count_objects,
    find_image,
    find_size,
    object_units,
    read_image,
    read_objects,
)
from data_pipeline.media.boxes import Box, BoxFormat, bounding_box, write_boxes
from data_pipeline.shards.members import IMAGE_EXTENSIONS

_KEYS = {"words", "width", "height", "box_format", "folder"}  # of a line; the folder is added in reading
_WORD_KEYS = {"text", "box", "polygon"}
_CORNERS_AND_WORD = re.compile(r'(-?\d+),?\s+(-?\d+),?\s+(-?\d+),?\s+(-?\d+),?\s+"(.*)"')  # of ICDAR 2013
# What ICDAR 2017 and 2019 (MLT) write before each word: x1,y1,...,x4,y4,Latin,STOP
_SCRIPTS = {"Arabic", "Bangla", "Chinese", "Hindi", "Japanese", "Korean", "Latin", "Mixed", "None", "Symbols"}
ILLEGIBLE = ("", "#", "###", "*")  # what ICDAR files contain in place of an illegible word


@dataclass(frozen=True)
class Word:
    """A legible word of an image."""

    text: str
    box: Box  # pixels


@dataclass(frozen=True)
class SceneText:
    """JSON lines or lists of images with words, and folders of images with one ICDAR file each."""

    paths: tuple[str, ...]
    images: str = ""  # folder that image names in JSON lines are relative to; empty: the folder of the JSON lines
    form: Literal["text", "boxes"] = "text"  # text: lines of words; boxes: one word and its box per line
    box_format: BoxFormat = "xyxy"  # of lines that do not name one; points of polygons count as its corners do

    def units(self) -> Sequence[Unit]:
        """Return one unit per ICDAR file, and units of JSON lines."""
        units: list[Unit] = []
        for path in self.paths:
            if Path(path).is_dir():
                units += _icdar_units(path)
                continue
            found = object_units(path, bytes_each=IMAGE_BYTES)
            first = [entry for _, entry in islice(read_objects(found[0]), NAMES_CHECKED) if isinstance(entry, dict)]
            check_folder(path, self.images, [find_image(entry)[0] for entry in first])
            units += found
        return units

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the lines, or one file of ICDAR's, and the other files of its folder."""
        if "image" not in unit.extra:
            return {"records": count_objects(unit)}
        return {"records": 1, "files": sum(unit.extra.get("other", {}).values())}

    def read(self, unit: Unit) -> Iterator[Draft | Rejected | NotRead]:
        """Yield one sample per image. Words that cannot be used are yielded as Rejected, one by one."""
        for name, count in unit.extra.get("other", {}).items():
            yield NotRead(name, count, {"files": count})
        for origin, found in _images(unit, self.images):
            if isinstance(found, BadSample):
                yield Rejected(origin, found.reason, found.detail, ONE_RECORD)
            else:
                yield from self._sample(origin, found)

    def _sample(self, origin: str, record: dict[str, Any]) -> Iterator[Draft | Rejected]:
        """Yield the sample of an image. Each word is in the sample, rejected, or counted as illegible."""
        given = record["words"] if isinstance(record.get("words"), list) else []
        rejected = 0
        try:
            name, image_key = find_image(record)
            image = read_image(name, Path(record["folder"]), record)
            if not isinstance(record.get("words"), list):
                raise BadSample("bad_record", 'the line has no list "words"')
            box_format = record.get("box_format", self.box_format)
            if box_format not in get_args(BoxFormat):
                raise BadSample("bad_record", f'"box_format" is {box_format!r}: use {", ".join(get_args(BoxFormat))}')
            words: list[Word] = []
            for number, word in enumerate(given):
                try:
                    if read := _word(word, image, box_format):
                        words.append(read)
                except BadSample as error:
                    rejected += 1
                    yield Rejected(f"{origin} word {number}", error.reason, error.detail, {"words": 1})
            if not words:
                raise BadSample("no_text", "the image has no legible word with a valid box")
        except BadSample as error:
            items = {"records": 1, "words": len(given) - rejected}
            yield Rejected(origin, error.reason, error.detail, items, {"words": len(given)})
            return
        unread = Counter(f"key {key}" for key in record.keys() - _KEYS - {image_key} - find_size(record)[1])
        unread.update(f"word key {key}" for word in given if isinstance(word, dict) for key in word.keys() - _WORD_KEYS)
        unread["word: illegible"] = len(given) - rejected - len(words)
        yield Draft(
            {"domain": "ocr", "text": self._text(words, image)},
            [image.media],
            origin=origin,
            items={"records": 1, "words": len(given) - rejected},
            given={"words": len(given)},
            not_read=+unread,
        )

    def _text(self, words: Sequence[Word], image: AnnotatedImage) -> str:
        lines = reading_order(words)
        if self.form == "text":
            return "\n".join(joined(line) for line in lines)
        return "\n".join(f"{word.text} {write_boxes([image.thousandths(word.box)])}" for line in lines for word in line)


def reading_order(words: Sequence[Word]) -> list[list[Word]]:
    """Group words into lines, and sort lines and words.

    A word belongs to the last line whose first word it overlaps vertically by half of the smaller height.
    """
    lines: list[list[Word]] = []
    for word in sorted(words, key=lambda word: (word.box[1] + word.box[3], word.box[0])):
        line = next((line for line in reversed(lines) if _same_line(line[0], word)), None)
        if line is None:
            lines.append([word])
        else:
            line.append(word)
    return [sorted(line, key=lambda word: word.box[0], reverse=_is_leftward(line)) for line in lines]


def joined(line: Sequence[Word]) -> str:
    """Join the words of a line with spaces, but without one between two characters of a script without spaces."""
    text = line[0].text
    for word in line[1:]:
        text += word.text if _is_unspaced(text[-1]) and _is_unspaced(word.text[0]) else f" {word.text}"
    return text


def _same_line(first: Word, second: Word) -> bool:
    shared = min(first.box[3], second.box[3]) - max(first.box[1], second.box[1])
    return shared >= 0.5 * min(first.box[3] - first.box[1], second.box[3] - second.box[1])


def _is_leftward(line: Sequence[Word]) -> bool:
    kinds = [unicodedata.bidirectional(letter) for word in line for letter in word.text]
    return sum(kind in ("R", "AL") for kind in kinds) > kinds.count("L")


def _is_unspaced(letter: str) -> bool:
    return unicodedata.east_asian_width(letter) in "WF" and not "\uac00" <= letter <= "\ud7a3"  # Hangul has spaces


def _word(word: Any, image: AnnotatedImage, box_format: BoxFormat) -> Word | None:
    """Return an annotated word, or None if it is illegible. Raises BadSample."""
    if not isinstance(word, dict) or not isinstance(word.get("text"), str):
        raise BadSample("bad_record", 'a word needs "text", and a "box" or a "polygon"')
    text = " ".join(word["text"].split())
    if text in ILLEGIBLE:
        return None
    if "polygon" in word:
        points = word["polygon"]
        if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
            raise BadSample("bad_box", "a polygon is a list of [x, y] points")
        corners = [value for point in points for value in point]
        if len(points) < 3 or not all(isinstance(value, (int, float)) and abs(value) < 1e9 for value in corners):
            raise BadSample("bad_box", "a polygon needs at least three points of two numbers")
        box = image.read_box(bounding_box(points), "xyxy" if box_format == "xywh" else box_format)
    else:
        box = image.read_box(word.get("box"), box_format)
    image.thousandths(box)  # rejects a box that is too thin, in either form
    return Word(text, box)


# --- ICDAR ------------------------------------------------------------------------------------------------------------


def _icdar_units(folder: str) -> list[Unit]:
    """Return one unit per text file, gt_NAME.txt or NAME.txt, that has an image. Raises DataError if there is none.

    The first one counts the folder's other files, by suffix, in `extra["other"]`.
    """
    files = sorted(files_below(Path(folder)))
    units, used = [], set()
    for labels in (path for path in files if path.suffix.lower() == ".txt"):
        for extension in IMAGE_EXTENSIONS:
            image = Path(as_stored(str(labels.with_name(f"{labels.stem.removeprefix('gt_')}.{extension}"))))
            if image.is_file():
                units.append(Unit(str(labels), bytes=IMAGE_BYTES, extra={"image": image.name}))
                used |= {labels, image}
                break
    if not units:
        raise DataError(f"{folder} contains no image with a gt_NAME.txt: give a folder of both, or JSON lines")
    units[0].extra["other"] = count_by_suffix(path for path in files if path not in used)
    return units


def _images(unit: Unit, folder: str) -> Iterator[tuple[str, dict[str, Any] | BadSample]]:
    """Yield the origin and {"image", "words", "folder"} of every image of a unit, or why it cannot be read."""
    if "image" in unit.extra:
        labels = Path(unit.path)
        try:
            words = _icdar_words(re.split(r"\r\n|\r|\n", _read_utf8(labels)))
            yield labels.name, {"image": unit.extra["image"], "folder": labels.parent, "words": words}
        except BadSample as error:
            yield labels.name, error
        return
    for origin, found in read_objects(unit):
        yield origin, found if isinstance(found, BadSample) else {**found, "folder": folder or Path(unit.path).parent}


def _read_utf8(path: Path) -> str:
    try:
        return read_whole(path.name, path.parent).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("bad_record", f"{path.name}: {error}") from error


def _icdar_words(lines: Sequence[str]) -> list[dict[str, Any] | None]:
    """Return the words of a file, without the scripts that some years write before them."""
    words = [_icdar_word(line) for line in lines if line.strip()]
    with_script = [word for word in words if word is not None and "polygon" in word]
    if all(word["text"].partition(",")[0] in _SCRIPTS and "," in word["text"] for word in with_script):
        for word in with_script:
            word["script"], _, word["text"] = word["text"].partition(",")
    return words


def _icdar_word(line: str) -> dict[str, Any] | None:
    """Return the word of a line; None, which is not a valid word, for a line of another form.

    ICDAR 2015 and later write x1,y1,x2,y2,x3,y3,x4,y4,text; ICDAR 2013 writes x1, y1, x2, y2, "text", with or without
    commas.
    """
    if found := _CORNERS_AND_WORD.fullmatch(line.strip()):
        return {"text": found[5], "box": [float(found[number]) for number in range(1, 5)]}
    parts = line.split(",", 8)
    try:
        numbers = [float(part) for part in parts[:8]]
    except ValueError:
        return None
    if len(parts) < 9:
        return None
    return {"text": parts[8], "polygon": [[x, y] for x, y in zip(numbers[::2], numbers[1::2], strict=True)]}
