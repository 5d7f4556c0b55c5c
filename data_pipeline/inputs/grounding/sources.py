"""Where records of images with boxes come from: JSON lines and lists, tables, tars, Flickr30k Entities.

The image of a record in a JSON file is a path. In a table or tar it may be the file itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, NotRead, Rejected, Unit
from data_pipeline.inputs.grounding.flickr_entities import count_sentences, folder_units, read_sentences
from data_pipeline.inputs.grounding.found import Found
from data_pipeline.inputs.media import as_media
from data_pipeline.inputs.records.annotations import (
    IMAGE_BYTES,
    count_objects,
    form_of,
    object_units,
    read_objects,
)
from data_pipeline.inputs.records.media_values import bytes_and_path
from data_pipeline.inputs.records.parquet import open_table, rows_of
from data_pipeline.inputs.records.tars import Tars

_ROWS_PER_BATCH = 32
_ADDED_BY_TARS = ("domain", "text")  # to the fields of a tar's KEY.json


@dataclass(frozen=True)
class Source:
    """A form of files with records."""

    units: Callable[[str], list[Unit]]
    count: Callable[[Unit], Mapping[str, int]]
    read: Callable[[Unit], Iterator[Found | Rejected | NotRead]]
    has_images: bool = False  # always in the files themselves


def source_of(path: str) -> Source | None:
    """Return what reads a file or folder; None for COCO annotations."""
    if os.path.isdir(path):
        return _ENTITIES
    if source := _BY_SUFFIX.get(Path(path).suffix.lower()):
        return source
    return None if form_of(path) == "object" else _JSON


def _read_json(unit: Unit) -> Iterator[Found]:
    for origin, found in read_objects(unit):
        yield Found(origin, found, {"records": 1})


# --- tables -----------------------------------------------------------------------------------------------------------


def _table_units(path: str) -> list[Unit]:
    """Return one unit per row group with rows; `extra["row"]` is the number of its first row, from 1."""
    units, row = [], 1
    with open_table(path) as file:
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            if group.num_rows:
                units.append(Unit(path, number, number + 1, group.total_byte_size, {"row": row}))
            row += group.num_rows
    if not units:
        raise DataError(f"{path}: no row in it")
    return units


def _count_rows(unit: Unit) -> Mapping[str, int]:
    with open_table(unit.path) as file:
        return {"rows": file.metadata.row_group(unit.start).num_rows}


def _read_rows(unit: Unit) -> Iterator[Found | Rejected]:
    name, row = Path(unit.path).name, unit.extra["row"]
    with open_table(unit.path) as file:
        end = row + file.metadata.row_group(unit.start).num_rows
        try:
            for batch in file.iter_batches(_ROWS_PER_BATCH, row_groups=[unit.start], use_threads=False):
                for values in rows_of(batch):
                    yield Found(f"{name}:{row}", _fields(values), {"rows": 1})
                    row += 1
        except (pa.ArrowException, OSError) as error:  # a damaged page: the rows after it cannot be found
            rest = {"rows": end - row}
            yield Rejected(f"{name}:{row}", "damaged_file", f"the rest of row group {unit.start}: {error}", rest)


def _fields(row: dict[str, Any] | BadSample) -> dict[str, Any] | BadSample:
    """Return a row without its empty fields, with its images as files."""
    if isinstance(row, BadSample):
        return row
    return {name: _image(value) for name, value in row.items() if value is not None}


def _image(value: Any) -> Any:
    """Return the file that a value of a table holds, a BadSample for other bytes; any other value as it is."""
    data, path = bytes_and_path(value)
    if not isinstance(data, bytes):
        return path if isinstance(value, dict) and value.keys() == {"bytes", "path"} else value
    try:
        return as_media(data, path)[1]
    except BadSample as error:  # rejects the row only if this is its image
        return error


# --- tars -------------------------------------------------------------------------------------------------------------


def _tar_units(path: str) -> list[Unit]:
    return [Unit(path, bytes=os.path.getsize(path))]


def _count_members(unit: Unit) -> Mapping[str, int]:
    return Tars((unit.path,)).given(unit)


def _read_tar(unit: Unit) -> Iterator[Found | Rejected | NotRead]:
    """Yield the fields of KEY.json of each sample of a tar, with its image."""
    for entry in Tars((unit.path,)).read(unit):
        if not isinstance(entry, Draft):
            yield entry
            continue
        items = {"members": entry.items["members"]}  # the messages of a chat are not given here
        if len(entry.images) != 1 or entry.videos:
            files = len(entry.images) + len(entry.videos)
            wrong = BadSample("bad_record", f"{files} images and videos: boxes need one image")
            yield Found(entry.origin, wrong, items)
        else:
            fields = {key: value for key, value in entry.record.items() if key not in _ADDED_BY_TARS}
            record = fields if "caption" in fields else {**fields, "caption": entry.record.get("text")}
            yield Found(entry.origin, {**record, "image": entry.images[0]}, items)


_JSON = Source(
    lambda path: object_units(path, bytes_each=IMAGE_BYTES),
    lambda unit: {"records": count_objects(unit)},
    _read_json,
)
_ENTITIES = Source(folder_units, count_sentences, read_sentences)
_BY_SUFFIX = {
    ".parquet": Source(_table_units, _count_rows, _read_rows),
    ".tar": Source(_tar_units, _count_members, _read_tar, has_images=True),
    ".txt": _ENTITIES,
}
