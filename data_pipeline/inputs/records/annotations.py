"""Annotation files with one JSON object per line or in one list, and the images that they name.

An annotation may say in which image its boxes count. The names of that size differ between data sets: see find_size.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Media, Unit
from data_pipeline.inputs.media import read_media
from data_pipeline.inputs.records.json_files import MAX_VALUE_BYTES, check_utf8, unit_values, value_units
from data_pipeline.inputs.records.jsonl import count_records, line_records, parse_json
from data_pipeline.media.box_frames import BoxFrame, find_frame
from data_pipeline.media.boxes import Box, BoxFormat, Thousandths, read_box, to_thousandths
from data_pipeline.media.image_files import probe_frame, probe_image

LINES_PER_UNIT = 256
NAMES_CHECKED = 16  # images of a file that tell in which folder they lie
IMAGE_BYTES = 200_000  # typical size of an image, to cut tasks by
_HEAD = 64 << 10  # bytes of a file that tell its form
_COCO_KEYS = {"images", "annotations", "categories"}

# Names of the width and height of the annotated image. The first pair is used alone if it is given.
_SIDES = (
    ("width", "height"),
    ("image_width", "image_height"),
    ("img_width", "img_height"),
    ("imageWidth", "imageHeight"),
    ("img_w", "img_h"),
    ("image_w", "image_h"),
    ("original_width", "original_height"),
    ("orig_width", "orig_height"),
    ("w", "h"),
)
# Names of both in one value: [width, height], or an object of both.
_SIZES = ("size", "image_size", "img_size", "imageSize", "original_size", "orig_size", "resolution", "image_resolution")
_WRITTEN_SIZE = re.compile(r"\W*\d+(?:\.\d+)?\s*[xX*,;\u00d7 ]\s*\d+(?:\.\d+)?\W*")
_IMAGE_NAMES = (
    "image",
    "image_path",
    "img_path",
    "file_name",
    "filename",
    "img_filename",
    "image_file",
    "img",
    "images",
)
_CORNER = {"x", "y", "left", "top", "xmin", "ymin"}  # beside these, w and h are of a box


@dataclass(frozen=True)
class AnnotatedImage:
    """An image file, its size, and the image in which its annotation counts."""

    media: Media  # the file
    width: int  # pixels, upright
    height: int  # pixels, upright
    frame: BoxFrame  # of the annotation

    def read_box(self, values: Any, box_format: BoxFormat) -> Box:
        """Return a box of the annotation in pixels of the upright image. Raises BadSample (bad_box)."""
        return self.frame.upright(read_box(values, box_format, self.frame.width, self.frame.height))

    def thousandths(self, box: Box) -> Thousandths:
        """Return a box in pixels of the upright image as it is written. Raises BadSample (bad_box)."""
        return to_thousandths(box, self.width, self.height)


def line_units(path: str, *, bytes_per_line: int) -> list[Unit]:
    """Cut a file into units of LINES_PER_UNIT lines.

    `start` and `stop` of a unit are bytes; `extra["line"]` is the number of its first line, from 1.

    Args:
        path: The annotation file.
        bytes_per_line: Typical size of one line's sample in a shard.

    Raises:
        DataError: The file cannot be read or is empty.
    """
    cuts, lines, size = [0], 0, 0
    try:
        with open(path, "rb") as file:
            for lines, line in enumerate(file, 1):
                size += len(line)
                if lines % LINES_PER_UNIT == 0:
                    cuts.append(size)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): give a file with one JSON object per line"
        ) from error
    if not size:
        raise DataError(f"{path} is empty: give a file with one JSON object per line")
    if cuts[-1] < size:
        cuts.append(size)
    return [
        Unit(
            path,
            start,
            stop,
            bytes=bytes_per_line * min(LINES_PER_UNIT, lines - number * LINES_PER_UNIT),
            extra={"line": number * LINES_PER_UNIT + 1},
        )
        for number, (start, stop) in enumerate(pairwise(cuts))
    ]


def object_units(path: str, *, bytes_each: int) -> list[Unit]:
    """Cut a file of JSON lines, or of a JSON list, into units of LINES_PER_UNIT objects.

    Raises:
        DataError: The file cannot be read, is empty, or is one object.
    """
    form = form_of(path)
    if form == "object":
        raise DataError(f"{path} is one object: write a list of records, or one record per line")
    return _list_units(path, bytes_each) if form == "list" else line_units(path, bytes_per_line=bytes_each)


def _list_units(path: str, bytes_each: int) -> list[Unit]:
    """Cut the entries of a JSON list, as json_files.value_units does."""
    units = list(value_units(path, "", lambda _: bytes_each, bytes_each * LINES_PER_UNIT))
    if not units[0].extra["entries"]:
        raise DataError(f"{path} is an empty list: give a file with entries")
    return units


def count_objects(unit: Unit) -> int:
    """Count the lines of a unit that are not blank, or its entries of a list."""
    return unit.extra["entries"] if "entries" in unit.extra else count_records(unit)


def form_of(path: str) -> Literal["lines", "list", "object"]:
    """Return how a file holds its annotations, whatever its name: JSON lines, a list, or one object.

    Raises:
        DataError: The file cannot be read, or is not in UTF-8.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a file of JSON") from error
    check_utf8(path, head)
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    first, _, rest = head.partition(b"\n")
    try:
        alone = json.loads(first)
    except (ValueError, RecursionError):  # the first line is a part of something larger, or no JSON
        alone = None
    if head.startswith(b"[") and (alone is None or not rest.strip()):
        return "list"
    is_json = path.lower().endswith(".json")
    if isinstance(alone, dict):
        return "object" if is_json and alone.keys() & _COCO_KEYS else "lines"
    return "object" if is_json and head.startswith(b"{") else "lines"


def read_objects(unit: Unit) -> Iterator[tuple[str, dict[str, Any] | BadSample]]:
    """Yield (origin, object) for every line that is not blank; a BadSample in place of what is not a JSON object.

    The origin is the file's name and the number of the line, or of the entry of a list: "captions.jsonl:17".
    """
    if "entries" in unit.extra:
        for number, entry in enumerate(unit_values(unit), unit.extra["entry"]):
            origin = f"{Path(unit.path).name}:{number}"
            if entry.stop - entry.start > MAX_VALUE_BYTES:
                yield origin, BadSample("member_too_large", f"a record of more than {MAX_VALUE_BYTES:,} bytes")
            else:
                yield origin, _object(entry.value)
        return
    for number, line in line_records(unit):
        origin = f"{Path(unit.path).name}:{number}"
        try:
            if line is None:
                raise BadSample("member_too_large", f"a record of more than {MAX_VALUE_BYTES:,} bytes")
            yield origin, _object(parse_json(line))
        except BadSample as error:
            yield origin, error


def _object(found: Any) -> dict[str, Any] | BadSample:
    return found if isinstance(found, dict) else BadSample("bad_record", "not a JSON object")


def check_folder(path: str, images: str, names: Iterable[Any]) -> None:
    """Check that the first images of an annotation file lie in the folder that is given, or beside the file.

    Args:
        path: The annotation file.
        images: The folder that is given; empty: none is.
        names: The paths of its first images.

    Raises:
        DataError: They lie in another folder. The message says in which.
    """
    wanted = [name for name in names if isinstance(name, str) and name and not os.path.isabs(name)]
    folder = Path(images or Path(path).parent)
    if images or not wanted or any(os.path.isfile(folder / name) for name in wanted):
        return
    for parent in (folder, folder.parent):
        for other in (parent, *sorted(parent.iterdir())):
            if os.path.isdir(other) and any(os.path.isfile(other / name) for name in wanted):
                raise DataError(f"{path}: its images are not beside it but in {other}: --set images={other}")


def read_image(name: Any, folder: Path, annotation: Mapping[str, Any]) -> AnnotatedImage:
    """Read an image by its path relative to the folder, which must contain it.

    Args:
        name: The path.
        folder: The folder.
        annotation: What names the image. It may give the size of the annotated image, see find_size.

    Raises:
        BadSample: The path is not a text, the file cannot be used (see read_media), it is not an image, or not the one
            that was annotated (size_mismatch).
    """
    if name is None and isinstance(annotation.get("url"), str):
        raise BadSample("remote_file", "its image is a URL: download it with img2dataset, and give the tars")
    return annotated_image(read_named(name, folder, "images"), annotation)


def annotated_image(media: Media, annotation: Mapping[str, Any]) -> AnnotatedImage:
    """Return an image with the frame of its annotation, which may give the size of the annotated image.

    Raises:
        BadSample: It is not an image, or not the one that was annotated (size_mismatch).
    """
    height, width = probe_image(media.data)
    stored, orientation = probe_frame(media.data)
    size, _ = find_size(annotation)
    return AnnotatedImage(media, width, height, find_frame(size, stored[::-1], orientation))


def find_image(annotation: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the image that an annotation names, None if it names none, and the key of it."""
    key = next((name for name in _IMAGE_NAMES if annotation.get(name)), "")
    value = annotation.get(key)
    return (value[0] if isinstance(value, list) and len(value) == 1 else value), key


def find_size(annotation: Mapping[str, Any]) -> tuple[tuple[Any, Any], set[str]]:
    """Return the (width, height) of the annotated image, None each if it is not given, and the keys that give it.

    Raises:
        BadSample: `size_mismatch`, if names other than width and height give different sizes, or no size.
    """
    found: dict[tuple[Any, Any], set[str]] = {}
    for across, down in _SIDES:
        if annotation.get(across) is None and annotation.get(down) is None:
            continue
        if (across, down) == ("w", "h") and annotation.keys() & _CORNER:
            continue
        sides = annotation.get(across), annotation.get(down)
        if across == "width":
            return sides, {across, down}
        if all(isinstance(side, (int, float)) for side in sides):
            found.setdefault(sides, set()).update((across, down))
        elif across != "w":
            raise BadSample("size_mismatch", f"{across} {sides[0]!r} and {down} {sides[1]!r} are not two numbers")
    for key in _SIZES:
        if size := _sides(key, annotation.get(key)):
            found.setdefault(size, set()).add(key)
    if len(found) > 1:
        names = " and ".join(f"{'/'.join(sorted(keys))} {w}x{h}" for (w, h), keys in found.items())
        raise BadSample("size_mismatch", f"{names}: name the size in which the boxes count width and height")
    return next(iter(found.items()), ((None, None), set()))


def _sides(key: str, value: Any) -> tuple[Any, Any] | None:
    """Return the (width, height) that a value stands for, or None for what is no size, such as a number of bytes."""
    if isinstance(value, Mapping):
        size, _ = find_size({name: value.get(name) for name in ("width", "height", "w", "h")})
        return None if size == (None, None) else size
    if isinstance(value, str) and _WRITTEN_SIZE.fullmatch(value):
        raise BadSample("size_mismatch", f'"{key}" is {value[:80]!r}: give the size as [width, height]')
    if not isinstance(value, list):
        return None
    if len(value) != 2 or not all(isinstance(side, (int, float)) for side in value):
        raise BadSample("size_mismatch", f'"{key}" is {str(value)[:80]}: give the size as [width, height]')
    return value[0], value[1]


def read_named(name: Any, folder: Path, field: str) -> Media:
    """Read a file (field `images` or `videos`) by its path relative to the folder, which must contain it.

    Raises:
        BadSample: The path is not a text, or the file cannot be used (see read_media).
    """
    if not isinstance(name, str) or not name:
        raise BadSample("bad_record", f"{field}: {name!r} is not a path")
    return read_media(name, folder, field)


def load_json(path: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        DataError: The file cannot be read, or is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}): fix it or remove it from the inputs") from error
