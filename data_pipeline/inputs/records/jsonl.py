"""JSON records that name their images and videos: one per line, or in a list.

    {"domain": "image_text", "text": "A tabby cat.", "images": ["cat.jpg"]}
    {"image": "cat.jpg", "caption": "A tabby cat."}

Paths are relative to the file. What a file holds is found from its content: see json_files.py. Conversations, questions
and documents in the formats of other tools are converted first: see chat_formats.py, questions.py and
interleaved_formats.py.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import ONE_RECORD, Draft, NotRead, Rejected, Unit, credited
from data_pipeline.inputs.names import shown_names
from data_pipeline.inputs.records import chat_formats
from data_pipeline.inputs.records.json_files import MAX_VALUE_BYTES, form_of, size_on_disk, unit_values, value_units
from data_pipeline.inputs.records.lazy_units import LazyUnits
from data_pipeline.inputs.records.named_media import RecordOptions, RecordReader, paths_named

UNIT_BYTES = 4 << 20  # of records and the files that they name; for lines, estimated from a sample of them
_LINES_PROBED = 64


@dataclass(frozen=True)
class JsonLines(RecordOptions):
    """Records in JSON. A unit is a range of bytes of a file: whole lines, or whole entries of a list."""

    paths: tuple[str, ...]  # .jsonl and .json files
    records: str = ""  # in a file of one object: the key of the list of records

    def units(self) -> Sequence[Unit]:
        """Return the units of all files, listed when they are asked for.

        Raises:
            DataError: All files are empty.
        """
        if not any(map(os.path.getsize, self.paths)):
            raise DataError(f"{', '.join(self.paths)}: no record in it")
        return LazyUnits(unit for path in self.paths for unit in self._units(path))

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the records."""
        return {"records": unit.extra["entries"] if "entries" in unit.extra else count_records(unit)}

    def read(self, unit: Unit) -> Iterator[Draft | Rejected | NotRead]:
        """Yield the samples of each record: one, or one for each of its captions."""
        shown = shown_names(self.paths)[unit.path]
        if not unit.stop:
            yield NotRead(f"empty file {Path(unit.path).suffix.lower()}")
        for key in unit.extra.get("other_keys", ()):
            yield NotRead(f"key {key} of the file")
        reader = RecordReader(self, Path(unit.path).parent)
        for number, record in (_list_records if "entries" in unit.extra else line_records)(unit):
            origin = f"{shown}:{number}"
            try:
                yield from credited(reader.drafts(_object(record), origin), ONE_RECORD)
            except BadSample as error:
                rejected = Rejected(origin, error.reason, error.detail, ONE_RECORD)
                yield rejected if reader.is_prompt(record) else chat_formats.finished_rejection(rejected, record)

    def _units(self, path: str) -> Iterator[Unit]:
        with open(path, "rb") as file:
            is_object = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
        key = self.records if is_object else ""
        if not key and form_of(path) == "lines":
            return _line_units(path)
        return value_units(path, key, partial(_bytes_of_value, Path(path).parent), UNIT_BYTES)


def _object(record: Any) -> dict[str, Any]:
    if record is None:
        raise BadSample("member_too_large", f"a record of more than {MAX_VALUE_BYTES:,} bytes")
    if isinstance(record, bytes):
        record = parse_json(record)
    if not isinstance(record, dict):
        raise BadSample("bad_record", "not a JSON object")
    return record


def parse_json(data: bytes) -> Any:
    """Return the value that the JSON text stands for.

    Raises:
        BadSample: bad_record.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_record", f"not JSON: {error}") from error


def _line_units(path: str) -> Iterator[Unit]:
    size = os.path.getsize(path)
    if not size:
        yield Unit(path, extra={"line": 1})
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        per_byte = _bytes_in_shard(data, Path(path).parent)
        step = max(1, int(UNIT_BYTES / per_byte))
        start, line = 0, 1
        while start < size:
            stop = data.find(b"\n", min(start + step, size) - 1) + 1 or size
            yield Unit(path, start, stop, int((stop - start) * per_byte), {"line": line})
            line += data[start:stop].count(b"\n")
            start = stop


def _bytes_in_shard(data: mmap.mmap, folder: Path) -> float:
    """Estimate how many bytes of a shard one byte of lines becomes, with the files that the lines name.

    Probes lines at evenly spaced positions of the file.
    """
    lines = files = 0
    positions = (len(data) * number // _LINES_PROBED for number in range(_LINES_PROBED))
    for start in sorted({data.rfind(b"\n", 0, position) + 1 for position in positions}):  # a long line only once
        end = data.find(b"\n", start)
        line = data[start : min(end if end >= 0 else len(data), start + MAX_VALUE_BYTES)]
        lines += len(line) + 1
        files += size_on_disk(folder, _paths_of_line(line))
    return 1 + files / lines


def _paths_of_line(line: bytes) -> list[str]:
    try:
        return paths_named(json.loads(line))
    except (ValueError, RecursionError):  # reading will reject it
        return []


def _bytes_of_value(folder: Path, record: Any) -> int:
    """Return the bytes of a record with the files that it names."""
    return len(json.dumps(record)) + size_on_disk(folder, paths_named(record))


def line_records(unit: Unit) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number, line) of a unit of whole lines; None for a line that is too long to be held in memory.

    Blank lines are skipped.

    Raises:
        DataError: The file became shorter after its units were listed.
    """
    with open(unit.path, "rb") as file:
        file.seek(unit.start)
        number = unit.extra["line"]
        while file.tell() < unit.stop:
            line = file.readline(MAX_VALUE_BYTES)
            if not line:
                raise DataError(f"{unit.path} became shorter while it was read: start again when it is complete")
            too_long = False
            while not line.endswith(b"\n") and (rest := file.readline(MAX_VALUE_BYTES)):
                line, too_long = rest, True
            if too_long:
                yield number, None
            elif line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield number, line.removeprefix(b"\xef\xbb\xbf")
            number += 1


def count_records(unit: Unit) -> int:
    """Count the lines of a unit that are not blank."""
    return sum(1 for _ in line_records(unit))


def _list_records(unit: Unit) -> Iterator[tuple[int, Any]]:
    for number, value in enumerate(unit_values(unit), start=unit.extra["entry"]):
        yield number, value.value if value.stop - value.start <= MAX_VALUE_BYTES else None
