"""Captions of the files in a folder: NAME.txt, NAME.json, and the lines of metadata.jsonl and metadata.csv.

{"file_name": "1.jpg", "text": "A cat."}                       one image; several lines may name the same one
{"file_name": "1.jpg", "captions": ["A cat.", "A pet."]}       several captions; also caption_1, caption_2 ...
{"file_names": ["1.jpg", "2.jpg"], "text": "..."}              several images
{"before_file_name": "1.jpg", "after_file_name": "2.jpg", ...} the same, as in Hugging Face's imagefolder
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.errors import BadSample
from data_pipeline.inputs.media import CAPTION_FIELDS, read_whole
from data_pipeline.inputs.records.jsonl import parse_json
from data_pipeline.inputs.records.record_fields import WITHOUT_TEXT

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_SUFFIXES = (".txt", ".json")
_LISTS = (*CAPTION_FIELDS, "captions", "texts", "sentences")  # fields that may hold several captions
_NUMBERED = re.compile(r"(text|caption)[_ -]?\d+")


@dataclass(frozen=True)
class Line:
    """A line of a metadata file."""

    files: tuple[str, ...]  # paths below the folder of the input (composed), in the order in which the line names them
    record: dict[str, Any]  # without the names of the files
    problem: str = ""  # why it cannot be used; empty: it can


@lru_cache(maxsize=8)
def metadata_lines(root: str, name: str, allow_outside: bool) -> tuple[Line, ...]:
    """Return all lines of a metadata file that are not blank.

    Args:
        root: The folder of the input.
        name: The file, below root.
        allow_outside: Accept a file outside the folder (a link).
    """
    try:
        content = decode_text(read_whole(name, Path(root), allow_outside=allow_outside), name)
        rows = list((_csv_rows if name.endswith(".csv") else _json_rows)(content))
    except (BadSample, csv.Error) as error:
        return (Line((), {}, str(error)),)
    return tuple(_line(number, row, PurePosixPath(name).parent) for number, row in rows)


def captioned(record: dict[str, Any], field: str = "") -> list[dict[str, Any]]:
    """Return one record for each caption of a record, with the caption in the field `text`.

    Captions that are not texts are not among them: see `lost_captions`.

    Args:
        record: Of a metadata line or NAME.json.
        field: The field with the caption; empty: one of the usual ones.

    Raises:
        BadSample: no_caption.
    """
    if "messages" in record or "conversations" in record:
        return [record]
    names = [field] if field else _caption_fields(record)
    texts = [text for name in names for text in _texts(record.get(name))]
    if not texts:
        found = ", ".join(name for name, value in record.items() if isinstance(value, str) and value.strip())
        other = f"; its fields with text are {found}: --set text=FIELD" if found else ""
        raise BadSample("no_caption", f"the caption is empty: put it in {' or '.join(CAPTION_FIELDS)}{other}")
    rest = {key: value for key, value in record.items() if key not in (*names, "text")}
    return [{"text": text, **rest} for text in texts]


def lost_captions(record: dict[str, Any], field: str = "") -> Counter[str]:
    """Count what `captioned` returns in no record, by name."""
    if "messages" in record or "conversations" in record:
        return Counter()
    names = [field] if field else _caption_fields(record)
    lost = Counter({"field text": int("text" not in names and bool(record.get("text")))})
    for value in (record.get(name) for name in names):
        lost[WITHOUT_TEXT] += len(value) - len(_texts(value)) if isinstance(value, list) else 0
    return +lost


def composed(name: str) -> str:
    """Return a file name in NFC, so that names compare equal however their accents are spelled (names.as_stored)."""
    return unicodedata.normalize("NFC", name)


def decode_text(data: bytes, name: str) -> str:
    """Return the text of a UTF-8 file. Raises BadSample: not_utf8."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("not_utf8", f"{name}: byte {error.start} is not UTF-8: convert the file with iconv") from error


def _caption_fields(record: dict[str, Any]) -> list[str]:
    """Return the fields with captions: the first of the usual ones that has any, or all numbered ones."""
    for name in _LISTS:
        if _texts(record.get(name)):
            return [name]
    return [name for name in record if _NUMBERED.fullmatch(name)]


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text.strip()]


def _line(number: int, row: Any, folder: PurePosixPath) -> Line:
    if not isinstance(row, dict):
        return Line((), {}, f'line {number} is not a record with a "file_name"')
    if any(row.get(None) or ()):  # of a CSV file
        return Line((), {}, f"line {number} has more values than the first line: put quotes around texts with commas")
    kept = {key: value for key, value in row.items() if key is not None and value is not None}
    single = kept.get("file_name")
    fields = ["file_name"] if "file_name" in kept else [key for key in kept if re.fullmatch(r"(.+_)?file_names?", key)]
    names = [single] if single else [name for key in fields for name in _texts(kept[key])]
    if not names or not all(isinstance(name, str) for name in names):
        return Line((), {}, f'line {number} is not a record with a "file_name"')
    rest = {key: value for key, value in kept.items() if key not in fields}
    return Line(tuple(composed(str(folder / name)) for name in names), rest)


def _csv_rows(content: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(content))
    for row in reader:
        yield reader.line_num, row


def _json_rows(content: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                yield number, parse_json(line.encode())
            except BadSample:
                yield number, None
