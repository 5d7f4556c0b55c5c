"""Annotation files of one JSON object a line, and the pictures that they name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipeline.errors import BadSample, DataError
from data_pipeline.images import probe_image
from data_pipeline.inputs.draft import Media, Unit
from data_pipeline.shards import IMAGE_EXTENSIONS

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
    number. Raises DataError if the file cannot be read."""
    cuts, lines, size = [0], 0, 0
    try:
        with open(path, "rb") as file:
            for lines, line in enumerate(file, 1):
                size += len(line)
                if lines % LINES_A_UNIT == 0:
                    cuts.append(size)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a file with one JSON object a line") from error
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
    with open(unit.path, "rb") as file:
        file.seek(unit.start)
        lines = file.read(unit.stop - unit.start).split(b"\n")
    for number, line in enumerate(lines, unit.extra["line"]):
        if not line.strip():
            continue
        origin = f"{Path(unit.path).name}:{number}"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield origin, BadSample("bad_record", f"not JSON: {error}")
            continue
        yield origin, found if isinstance(found, dict) else BadSample("bad_record", "not a JSON object")


def read_picture(name: Any, folder: Path) -> Picture:
    """A picture by its path, relative to the folder. Raises BadSample."""
    data = read_media(name, folder, IMAGE_EXTENSIONS, "image")
    height, width = probe_image(data.data)
    return Picture(data, width, height)


def read_media(name: Any, folder: Path, extensions: Sequence[str], word: str) -> Media:
    """A file by its path, relative to the folder. Raises BadSample if there is none or it is of another kind."""
    if not isinstance(name, str) or not name:
        raise BadSample("bad_record", f'"{word}" must be the path of a file')
    extension = Path(name).suffix.lower().lstrip(".")
    if extension not in extensions:
        raise BadSample("unknown_extension", f"{name}: this {word} must end in one of {', '.join(extensions)}")
    try:
        return Media(extension, (folder / name).read_bytes())
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise BadSample("missing_file", f"{name}: {error}") from error


@lru_cache(maxsize=1)
def load_json(path: str) -> Any:
    """A whole JSON file, the last one kept. Raises DataError."""
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}): mend it or leave it out") from error
