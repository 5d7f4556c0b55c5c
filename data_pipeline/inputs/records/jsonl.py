"""JSON records that name their images and videos: one per line, or one list in a .json file.

    {"domain": "image_text", "text": "A tabby cat.", "images": ["cat.jpg"]}

Paths are relative to the file. Conversations and documents in the formats of other tools are converted first: see
chat_formats.py and interleaved_formats.py.
"""

from __future__ import annotations

import json
import mmap
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import ONE_RECORD, Draft, Media, Rejected, Unit
from data_pipeline.inputs.media import EXTENSIONS, as_media, read_media
from data_pipeline.inputs.names import shown_names
from data_pipeline.inputs.records import chat_formats, interleaved_formats
from data_pipeline.inputs.references import decode_data_uri, is_data_uri
from data_pipeline.shards.members import MAX_BYTES

UNIT_BYTES = 4 << 20  # of lines and the files that they name, estimated from a sample of lines
MAX_LINE_BYTES = MAX_BYTES["json"]
_LINES_PROBED = 64


@dataclass(frozen=True)
class JsonLines:
    """Records in JSON. A unit is a range of whole lines of a file (in bytes), or a range of a list (in entries)."""

    paths: tuple[str, ...]  # .jsonl and .json files
    domain: str = ""  # of records that name none
    allow_outside: bool = False  # accept files outside the folder of the file that names them

    def units(self) -> Sequence[Unit]:
        """Return the units of all files; for lines, `extra["line"]` is the number of the first one, from 1."""
        _load_list.cache_clear()  # the file may have changed
        units = [unit for path in self.paths for unit in (_list_units if _is_list(path) else _line_units)(path)]
        if not units:
            raise DataError(f"{', '.join(self.paths)}: no record in it")
        return units

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the records."""
        return {"records": unit.stop - unit.start if _is_list(unit.path) else count_records(unit)}

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        """Yield one sample per record."""
        shown = shown_names(self.paths)[unit.path]
        for number, record in (_list_records if _is_list(unit.path) else line_records)(unit):
            origin = f"{shown}:{number}"
            try:
                draft = self._draft(record, Path(unit.path).parent, origin)
                yield replace(draft, items={**draft.items, **ONE_RECORD})
            except BadSample as error:
                rejected = Rejected(origin, error.reason, error.detail, ONE_RECORD)
                yield chat_formats.finished_rejection(rejected, record)

    def _draft(self, record: Any, folder: Path, origin: str) -> Draft:
        if record is None:
            raise BadSample("member_too_large", f"a line of more than {MAX_LINE_BYTES:,} bytes")
        if isinstance(record, bytes):
            record = parse_json(record)
        if not isinstance(record, dict):
            raise BadSample("bad_record", "not a JSON object")
        if self.domain and "domain" not in record:
            record = {"domain": self.domain, **record}
        return draft_of_record(record, folder, origin, allow_outside=self.allow_outside)


def draft_of_record(record: dict[str, Any], folder: Path, origin: str, *, allow_outside: bool = False) -> Draft:
    """Build the draft of a record, with the files that it names.

    Args:
        record: "images" and "videos" are paths relative to `folder`, or data: URIs.
        folder: The folder that the files must lie in.
        origin: Where the record comes from.
        allow_outside: Accept files outside `folder`.

    Raises:
        BadSample: The record or one of its files cannot be used.
    """
    given, notes = record, Counter[str]()
    record = _convert(record, notes)
    media = {}
    for field in EXTENSIONS:
        singular = field.removesuffix("s")
        if isinstance(record.get(singular), str) and field not in record and record.get("domain") != "text":
            fix = "use --kind grounding" if "phrases" in record else f'write "{field}": ["{record[singular][:80]}"]'
            raise BadSample("bad_record", f'"{singular}" is not read here: {fix}')
        paths = record.get(field) or []
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise BadSample("bad_record", f'"{field}" must be a list of paths')
        media[field] = [_media(path, folder, field, allow_outside) for path in paths]
    rest = {key: value for key, value in record.items() if key not in media}
    return chat_formats.finished(Draft(rest, media["images"], media["videos"], origin), given, notes)


def _media(path: str, folder: Path, field: str, allow_outside: bool) -> Media:
    if not is_data_uri(path):
        return read_media(path, folder, field, allow_outside=allow_outside)
    actual_field, media = as_media(decode_data_uri(path))
    if actual_field != field:
        raise BadSample("unknown_extension", f"a .{media.extension} file among the {field}")
    return media


def parse_json(data: bytes) -> Any:
    """Return the value that the JSON text stands for.

    Raises:
        BadSample: bad_record.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_record", f"not JSON: {error}") from error


def _is_list(path: str) -> bool:
    """Return whether a .json file holds one list, not one object per line.

    Raises:
        DataError: The file is one object over many lines.
    """
    if not path.lower().endswith(".json"):
        return False
    with open(path, "rb") as file:
        beginning = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if beginning.split(b"\n")[0].strip() == b"{":
        raise DataError(
            f"{path} is one object over many lines: write a list of records, or one record per line; "
            "for COCO annotations use --kind grounding"
        )
    return beginning.startswith(b"[")


def _line_units(path: str) -> Iterator[Unit]:
    size = os.path.getsize(path)
    if not size:
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
        line = data[start : min(end if end >= 0 else len(data), start + MAX_LINE_BYTES)]
        lines += len(line) + 1
        files += sum(_size(folder / path) for path in _paths_named(line))
    return 1 + files / lines


def _convert(record: dict[str, Any], notes: Counter[str] | None = None) -> dict[str, Any]:
    """Convert a record in the format of another tool; return any other record unchanged."""
    if chat_formats.is_foreign_chat(record):
        return chat_formats.normalise(record, notes)
    if interleaved_formats.is_foreign_interleaved(record):
        return interleaved_formats.normalise(record)
    return record


def _paths_named(line: bytes) -> list[str]:
    try:
        record = _convert(json.loads(line))
        return [path for field in EXTENSIONS for path in record.get(field) or [] if isinstance(path, str)]
    except (ValueError, RecursionError, AttributeError, TypeError):  # reading will reject it
        return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return 0


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
            line = file.readline(MAX_LINE_BYTES)
            if not line:
                raise DataError(f"{unit.path} became shorter while it was read: start again when it is complete")
            too_long = False
            while not line.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
                line, too_long = rest, True
            if too_long:
                yield number, None
            elif line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield number, line.removeprefix(b"\xef\xbb\xbf")
            number += 1


def count_records(unit: Unit) -> int:
    """Count the lines of a unit that are not blank."""
    return sum(1 for _ in line_records(unit))


def _list_units(path: str) -> list[Unit]:
    records = _load_list(path)
    folder = Path(path).parent
    units: list[Unit] = []
    start = size = 0
    for stop, record in enumerate(records, start=1):
        line = json.dumps(record).encode()
        size += len(line) + sum(_size(folder / name) for name in _paths_named(line))
        if size >= UNIT_BYTES or stop == len(records):
            units.append(Unit(path, start, stop, size))
            start, size = stop, 0
    return units


def _list_records(unit: Unit) -> Iterator[tuple[int, Any]]:
    yield from enumerate(_load_list(unit.path)[unit.start : unit.stop], start=unit.start + 1)


@lru_cache(maxsize=1)
def _load_list(path: str) -> list[Any]:
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON list ({error}): fix it, or write one object per line") from error
