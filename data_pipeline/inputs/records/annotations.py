"""Annotation files with one JSON object per line, and the images that they name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Media, Unit
from data_pipeline.inputs.media import read_media
from data_pipeline.inputs.records.jsonl import line_records, parse_json
from data_pipeline.media.box_frames import BoxFrame, find_frame
from data_pipeline.media.boxes import Box, BoxFormat, Thousandths, read_box, to_thousandths
from data_pipeline.media.image_files import probe_frame, probe_image

LINES_PER_UNIT = 256
IMAGE_BYTES = 200_000  # typical size of an image, to cut tasks by


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


def read_objects(unit: Unit) -> Iterator[tuple[str, dict[str, Any] | BadSample]]:
    """Yield (origin, object) for every line that is not blank; a BadSample in place of what is not a JSON object.

    The origin is the file's name and the line number: "captions.jsonl:17".
    """
    for number, line in line_records(unit):
        origin = f"{Path(unit.path).name}:{number}"
        try:
            if line is None:
                raise BadSample("member_too_large", "the line is too long to be held in memory")
            found = parse_json(line)
            yield origin, found if isinstance(found, dict) else BadSample("bad_record", "not a JSON object")
        except BadSample as error:
            yield origin, error


def read_image(name: Any, folder: Path, annotation: Mapping[str, Any]) -> AnnotatedImage:
    """Read an image by its path relative to the folder, which must contain it.

    Args:
        name: The path.
        folder: The folder.
        annotation: What names the image. Its `width` and `height`, if it has them, are those of the annotated image.

    Raises:
        BadSample: The path is not a text, the file cannot be used (see read_media), it is not an image, or not the one
            that was annotated (size_mismatch).
    """
    media = read_named(name, folder, "images")
    height, width = probe_image(media.data)
    stored, orientation = probe_frame(media.data)
    frame = find_frame((annotation.get("width"), annotation.get("height")), stored[::-1], orientation)
    return AnnotatedImage(media, width, height, frame)


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
