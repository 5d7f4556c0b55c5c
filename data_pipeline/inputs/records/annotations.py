"""Annotation files of one JSON object a line, and the pictures that they name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Media, Unit
from data_pipeline.inputs.media import read_media
from data_pipeline.inputs.records.jsonl import line_records, parse_json
from data_pipeline.media.images import probe_image

LINES_A_UNIT = 256
PICTURE_BYTES = 200_000  # what a picture takes, roughly: enough to cut tasks by


@dataclass(frozen=True)
class Picture:
    """A picture's bytes and its upright size in pixels."""

    media: Media
    width: int
    height: int


def line_units(path: str, *, bytes_a_line: int) -> list[Unit]:
    """Cuts a file into units of LINES_A_UNIT lines: start and stop count bytes, extra["line"] is the first line's
    number. Raises DataError if the file cannot be read or is empty."""
    cuts, lines, size = [0], 0, 0
    try:
        with open(path, "rb") as file:
            for lines, line in enumerate(file, 1):
                size += len(line)
                if lines % LINES_A_UNIT == 0:
                    cuts.append(size)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a file with one JSON object a line") from error
    if not size:
        raise DataError(f"{path} is empty: give a file with one JSON object a line")
    if cuts[-1] < size:
        cuts.append(size)
    return [
        Unit(
            path,
            start,
            stop,
            bytes=bytes_a_line * min(LINES_A_UNIT, lines - number * LINES_A_UNIT),
            extra={"line": number * LINES_A_UNIT + 1},
        )
        for number, (start, stop) in enumerate(pairwise(cuts))
    ]


def read_objects(unit: Unit) -> Iterator[tuple[str, dict[str, Any] | BadSample]]:
    """(origin, object) of every line that is not blank, "captions.jsonl:17"; BadSample where it is no JSON object."""
    for number, line in line_records(unit):
        origin = f"{Path(unit.path).name}:{number}"
        try:
            if line is None:
                raise BadSample("member_too_large", "the line is too long to be held in memory")
            found = parse_json(line)
            yield origin, found if isinstance(found, dict) else BadSample("bad_record", "not a JSON object")
        except BadSample as error:
            yield origin, error


def read_picture(name: Any, folder: Path) -> Picture:
    """A picture by its path, relative to the folder and inside it. Raises BadSample."""
    media = read_named(name, folder, "images")
    height, width = probe_image(media.data)
    return Picture(media, width, height)


def read_named(name: Any, folder: Path, field: str) -> Media:
    """A file (`images` or `videos`) by its path, relative to the folder and inside it. Raises BadSample."""
    if not isinstance(name, str) or not name:
        raise BadSample("bad_record", f"the path of one of its {field} is {name!r}")
    return read_media(name, folder, field)


def load_json(path: str) -> Any:
    """A whole JSON file. Raises DataError."""
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}): mend it or leave it out") from error
