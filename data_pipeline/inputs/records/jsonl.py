"""Records in JSON, one a line (or one list in a .json file), that name their pictures and clips.

    {"domain": "image_text", "text": "A tabby cat.", "images": ["cat.jpg"]}

Paths are relative to the file. A record with a conversation in another format is converted first: see chat_formats.py.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Media, Rejected, Unit
from data_pipeline.inputs.media import EXTENSIONS, as_media, read_media
from data_pipeline.inputs.names import shown_names
from data_pipeline.inputs.records import chat_formats, interleaved_formats
from data_pipeline.inputs.references import data_uri, is_data_uri
from data_pipeline.shards.members import MAX_BYTES

UNIT_BYTES = 4 << 20  # of lines and the files that they name, as far as a few lines tell
MAX_LINE_BYTES = MAX_BYTES["json"]
_LINES_PROBED = 64


@dataclass(frozen=True)
class JsonLines:
    """domain: of records that name none. allow_outside: files may lie outside the folder of the file that names them.

    A unit is a run of whole lines of a file (start, stop: bytes; extra: the number of the first line), or of a list
    (start, stop: places in it).
    """

    paths: tuple[str, ...]
    domain: str = ""
    allow_outside: bool = False

    def units(self) -> Sequence[Unit]:
        _load_list.cache_clear()  # the file may be another one by now
        units = [unit for path in self.paths for unit in (_list_units if _is_list(path) else _line_units)(path)]
        if not units:
            raise DataError(f"{', '.join(self.paths)}: not one record in it")
        return units

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        shown = shown_names(self.paths)[unit.path]
        for number, record in (_list_records if _is_list(unit.path) else line_records)(unit):
            origin = f"{shown}:{number}"
            try:
                yield self._draft(record, Path(unit.path).parent, origin)
            except BadSample as error:
                yield Rejected(origin, error.reason, error.detail)

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
    """A record whose "images" and "videos" are paths relative to `folder` or data: URIs. Raises BadSample."""
    record = _in_our_form(record)
    media = {}
    for field in EXTENSIONS:
        alone = field.removesuffix("s")
        if isinstance(record.get(alone), str) and field not in record and record.get("domain") != "text":
            mend = "use --kind grounding" if "phrases" in record else f'write "{field}": ["{record[alone][:80]}"]'
            raise BadSample("bad_record", f'"{alone}" is not read here: {mend}')
        paths = record.get(field) or []
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise BadSample("bad_record", f'"{field}" must be a list of paths')
        media[field] = [_media(path, folder, field, allow_outside) for path in paths]
    rest = {key: value for key, value in record.items() if key not in media}
    return Draft(rest, media["images"], media["videos"], origin)


def _media(path: str, folder: Path, field: str, allow_outside: bool) -> Media:
    if not is_data_uri(path):
        return read_media(path, folder, field, allow_outside=allow_outside)
    kind, media = as_media(data_uri(path))
    if kind != field:
        raise BadSample("unknown_extension", f"a .{media.extension} among the {field}")
    return media


def parse_json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_record", f"not JSON: {error}") from error


def _is_list(path: str) -> bool:
    """Whether a .json file holds one list and not an object a line. Raises DataError for an object over many lines."""
    if not path.lower().endswith(".json"):
        return False
    with open(path, "rb") as file:
        beginning = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if beginning.split(b"\n")[0].strip() == b"{":
        raise DataError(
            f"{path} is one object over many lines: write a list of records, or one a line; COCO's annotations are "
            "--kind grounding"
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
    """Bytes that one byte of lines becomes with the files that it names, from lines spread over the file."""
    lines = files = 0
    places = (len(data) * number // _LINES_PROBED for number in range(_LINES_PROBED))
    for start in sorted({data.rfind(b"\n", 0, place) + 1 for place in places}):  # a long line once
        end = data.find(b"\n", start)
        line = data[start : min(end if end >= 0 else len(data), start + MAX_LINE_BYTES)]
        lines += len(line) + 1
        files += sum(_size(folder / path) for path in _paths_named(line))
    return 1 + files / lines


def _in_our_form(record: dict[str, Any]) -> dict[str, Any]:
    """A record in one of the forms of others, in ours; any other as it is. Raises BadSample."""
    if chat_formats.is_foreign_chat(record):
        return chat_formats.normalise(record)
    if interleaved_formats.is_foreign_interleaved(record):
        return interleaved_formats.normalise(record)
    return record


def _paths_named(line: bytes) -> list[str]:
    try:
        record = _in_our_form(json.loads(line))
        return [path for field in EXTENSIONS for path in record.get(field) or [] if isinstance(path, str)]
    except (ValueError, RecursionError, AttributeError, TypeError):  # it will be rejected when it is read
        return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return 0


def line_records(unit: Unit) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) of a unit of whole lines; None for a line that is too long to be held in memory."""
    with open(unit.path, "rb") as file:
        file.seek(unit.start)
        number = unit.extra["line"]
        while file.tell() < unit.stop:
            line = file.readline(MAX_LINE_BYTES)
            if not line:
                raise DataError(f"{unit.path} became shorter while it was read: start again with a fixed file")
            too_long = False
            while not line.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
                line, too_long = rest, True
            if too_long:
                yield number, None
            elif line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield number, line.removeprefix(b"\xef\xbb\xbf")
            number += 1


def _list_units(path: str) -> list[Unit]:
    records = _load_list(path)
    folder = Path(path).parent
    cuts: list[Unit] = []
    start = taken = 0
    for place, record in enumerate(records, start=1):
        line = json.dumps(record).encode()
        taken += len(line) + sum(_size(folder / name) for name in _paths_named(line))
        if taken >= UNIT_BYTES or place == len(records):
            cuts.append(Unit(path, start, place, taken))
            start, taken = place, 0
    return cuts


def _list_records(unit: Unit) -> Iterator[tuple[int, Any]]:
    yield from enumerate(_load_list(unit.path)[unit.start : unit.stop], start=unit.start + 1)


@lru_cache(maxsize=1)
def _load_list(path: str) -> list[Any]:
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a list in JSON ({error}): mend it, or write one object a line") from error
