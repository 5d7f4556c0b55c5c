r"""What a JSON file holds, by its content and not by its suffix, and its units.

    lines      {"text": "a"}\n{"text": "b"}     one record per line
    list       [{"text": "a"}, {"text": "b"}]   one list, on one line or many
    values     objects over several lines, one after the other; also a single one
    list at    {"data": [...], "version": 1}    the list under a key that the user names: --set records=data

A list is never held in memory: its units are ranges of bytes that hold whole values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import Unit
from data_pipeline.inputs.records.json_stream import (
    BOM,
    Value,
    Window,
    first_keys,
    list_values,
    object_lists,
    values,
)
from data_pipeline.shards.members import MAX_BYTES

MAX_VALUE_BYTES = MAX_BYTES["json"]  # of a record
_PROBED_BYTES = 64 << 10  # from which the form of a file is found
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# Keys under which an object that is not a record keeps its records, and the keys of records.
_LIST_KEYS = frozenset(
    (
        *("data", "annotations", "records", "samples", "items", "examples", "rows", "entries", "documents"),
        *("train", "test", "validation", "val", "dataset", "results", "instances", "categories"),
    )
)
_RECORD_KEYS = frozenset(
    (
        *("domain", "text", "texts", "text_list", "messages", "conversations", "conversation", "instruction"),
        *(
            "caption",
            "captions",
            "image",
            "image_info",
            "video",
            "videos",
            "question",
            "file_name",
            "prompt",
            "data_source",
        ),
    )
)


def check_utf8(path: str, beginning: bytes) -> None:
    """Check that a file, which begins with these bytes, is not in UTF-16 or UTF-32. Raises DataError."""
    if beginning.startswith(_UTF16) or b"\0" in beginning[:4]:
        raise DataError(f"{path} is text in UTF-16 or UTF-32: convert it with iconv -f UTF-16 -t UTF-8 {path}")


def form_of(path: str) -> str:
    """Return "lines", "list" or "values". An empty file has "lines".

    Raises:
        DataError: It is text in UTF-16 or UTF-32, or one object that is not a record.
    """
    with open(path, "rb") as file:
        beginning = file.read(_PROBED_BYTES)
    check_utf8(path, beginning)
    beginning = beginning.removeprefix(BOM).lstrip()
    first, newline, rest = beginning.partition(b"\n")
    first, rest = first.strip(), rest.lstrip()
    if beginning.startswith(b"["):
        return "lines" if first.endswith(b"]") and rest and _is_json(first) else "list"
    if not beginning.startswith(b"{"):
        return "lines"
    if newline and _is_json(first) and rest:
        return "lines"
    _check_record(path, first_keys(beginning))
    if not newline or _is_json(first):
        return "lines"
    return "values" if first == b"{" or first_object_end(beginning) > len(first) else "lines"


def first_object_end(beginning: bytes) -> int:
    """Return the byte after the object that a text begins with; 0 if it does not end in it, or is damaged."""
    text = beginning.decode("utf-8", "ignore")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return 0
    return len(text[:end].encode())


def value_units(path: str, key: str, size_of: Callable[[Any], int], unit_bytes: int) -> Iterator[Unit]:
    """Yield the units of a file that holds a list, or values one after the other.

    `start` and `stop` are bytes. `extra` has the number of the first record (`entry`, from 1), how many there are
    (`entries`), whether commas separate them, and the keys of the object that are not read (`other_keys`).

    Args:
        path: The file.
        key: The list lies under this key of an object; empty: the file is a list or values.
        size_of: Estimates the bytes of a record in a shard.
        unit_bytes: A unit ends when it has as many bytes in a shard.

    Raises:
        DataError: It is not JSON, or has no list under the key.
    """
    other_keys: list[str] = []
    size = entries = before = start = stop = 0
    try:
        with open(path, "rb") as file:
            commas, found = _open_values(file, path, key, other_keys)
            for value in found:
                if not entries:
                    start = value.start
                size, stop, entries = size + size_of(value.value), value.stop, entries + 1
                if size >= unit_bytes:
                    yield Unit(path, start, stop, size, _extra(before, entries, commas))
                    before, entries, size = before + entries, 0, 0
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is not valid JSON ({error or 'too deeply nested'}): fix it, or write one object per line"
        ) from error
    if entries or other_keys or not before:
        yield Unit(path, start, stop, size, {**_extra(before, entries, commas), "other_keys": other_keys})


def unit_values(unit: Unit) -> Iterator[Value]:
    """Yield the values of a unit of `value_units`.

    Raises:
        DataError: The file changed after its units were listed.
    """
    if not unit.extra["entries"]:
        return
    try:
        with open(unit.path, "rb") as file:
            yield from values(file, unit.start, unit.stop, commas=unit.extra["commas"], whole=False)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{unit.path} changed while it was read ({error}): start again when it is complete") from error


def _extra(before: int, entries: int, commas: bool) -> dict[str, Any]:
    return {"entry": before + 1, "entries": entries, "commas": commas}


def _open_values(file: BinaryIO, path: str, key: str, other_keys: list[str]) -> tuple[bool, Iterator[Value]]:
    """Return whether commas separate the values of a file, and the values."""
    size = os.path.getsize(path)
    start = len(BOM) if file.read(len(BOM)) == BOM else 0
    window = Window(file, start, size)
    if key:
        return True, _values_at(window, path, key, other_keys)
    if window.peek() == "[":
        return True, values(file, window.offset + 1, size)
    return False, values(file, start, size, commas=False)


def _values_at(window: Window, path: str, key: str, other_keys: list[str]) -> Iterator[Value]:
    """Yield the values of the list under a key of an object; the other keys go to `other_keys`."""
    keys: list[tuple[str, str]] = []
    found = False
    for name in object_lists(window, keys):
        if name == key and not found:
            found = True
            yield from list_values(window)
        else:
            for _ in list_values(window):
                pass
    if not found:
        names = ", ".join(dict.fromkeys(name for name, _ in keys))
        raise DataError(f"{path} has no list {key!r}: --set records=KEY with one of its keys {names}")
    if window.peek():
        raise DataError(
            f"{path} holds more than one object (at byte {window.offset}), and --set records={key} reads one: write "
            "the records one per line, and give the file without this option"
        )
    other_keys += [name for name, _ in keys if name != key]


def _check_record(path: str, keys: list[tuple[str, str]]) -> None:
    """Check that an object which may be alone in its file is a record, and not a whole data set. Raises DataError."""
    names = [name for name, _ in keys]
    first = next((name for name in names if name in _RECORD_KEYS | _LIST_KEYS or name == "images"), "")
    lists = [name for name, mark in keys if mark.startswith("[")]
    holds_objects = [name for name, mark in keys if mark == "[{"]
    if first in _RECORD_KEYS or not lists:
        return
    if {"images", "annotations"} <= set(lists):
        raise DataError(f"{path} is one object, not a list of records: for COCO annotations use --kind grounding")
    wrapping = [name for name in lists if name in _LIST_KEYS or name in holds_objects]
    if not wrapping or (first == "images" and "images" not in holds_objects):
        return
    options = " or ".join(f"--set records={name}" for name in wrapping)
    raise DataError(
        f"{path} is one object with {', '.join(names)}, not a list of records: {options} reads that list; "
        "for COCO annotations use --kind grounding"
    )


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def size_on_disk(folder: Path, paths: list[str]) -> int:
    """Return the bytes of the files that exist."""
    return sum(map(partial(_size, folder), paths))


def _size(folder: Path, path: str) -> int:
    try:
        return (folder / path).stat().st_size
    except (OSError, ValueError):
        return 0
