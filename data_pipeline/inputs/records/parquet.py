"""Parquet tables of text and images, as Hugging Face datasets write them.

An image is bytes, a struct {"bytes", "path"} or a list of these. A column of paths relative to the file works too.
Columns are found by their names and types, or named by the user: --set text=caption --set image=left,right. All other
columns are kept in the record. Columns of URLs are refused: img2dataset downloads the files and writes tars.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Media, Rejected, Unit
from data_pipeline.inputs.media import CAPTION_FIELDS, as_media, guess_domain, read_media
from data_pipeline.inputs.names import shown_names
from data_pipeline.inputs.records.chat_formats import finished, finished_rejection, is_foreign_chat, normalise_nameless

# Names by which columns are found. The first that exists is used.
_TEXT_NAMES = (*CAPTION_FIELDS, "txt", "content")
_CHAT_NAMES = ("messages", "conversations")
_MEDIA_NAMES = {"images": ("image", "images", "jpg", "png", "picture"), "videos": ("video", "videos", "mp4", "clip")}
_URL_NAMES = ("url", "urls", "image_url", "image_urls", "video_url")
_ROWS_PER_BATCH = 32


@dataclass(frozen=True)
class Parquet:
    """Parquet files. A unit is a row group; its `start` is the number of the group."""

    paths: tuple[str, ...]  # .parquet files
    text: str = ""  # column of the text; empty: found by name
    image: tuple[str, ...] = ()  # columns of images; empty: found by name
    video: tuple[str, ...] = ()  # columns of videos; empty: found by name
    domain: str = ""  # of rows without a column `domain`; empty: from the number of images and videos (guess_domain)
    allow_outside: bool = False  # accept files outside the folder of the table that names them

    def units(self) -> Sequence[Unit]:
        """Return one unit per row group with rows; `extra["rows"]` is the number of rows before it."""
        units = []
        for path in self.paths:
            with _open(path) as file:
                self._columns(path, file.schema_arrow)
                rows_before = 0
                for number in range(file.num_row_groups):
                    group = file.metadata.row_group(number)
                    if group.num_rows:
                        units.append(Unit(path, number, number + 1, group.total_byte_size, {"rows": rows_before}))
                    rows_before += group.num_rows
        if not units:
            raise DataError(f"{', '.join(self.paths)}: no row in it")
        return units

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the rows."""
        with _open(unit.path) as file:
            return {"rows": file.metadata.row_group(unit.start).num_rows}

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        """Yield one sample per row. A damaged row group gives one Rejected for its remaining rows."""
        shown = shown_names(self.paths)[unit.path]
        row = unit.extra["rows"]
        with _open(unit.path) as file:
            columns = self._columns(unit.path, file.schema_arrow)
            try:
                for batch in file.iter_batches(_ROWS_PER_BATCH, row_groups=[unit.start], columns=columns.wanted):
                    for values in _rows(batch):
                        row += 1
                        raw = dict(values) if isinstance(values, dict) else None
                        try:
                            if isinstance(values, BadSample):
                                raise values
                            draft = self._draft(values, columns, Path(unit.path).parent, f"{shown}:{row}")
                            yield replace(draft, items={**draft.items, "rows": 1})
                        except BadSample as error:
                            rejected = Rejected(f"{shown}:{row}", error.reason, error.detail, {"rows": 1})
                            yield finished_rejection(rejected, raw)
            except (pa.ArrowException, OSError) as error:  # a damaged data page: the rows after it cannot be found
                rest = {"rows": unit.extra["rows"] + file.metadata.row_group(unit.start).num_rows - row}
                yield Rejected(
                    f"{shown}:{row + 1}", "damaged_file", f"the rest of row group {unit.start}: {error}", rest
                )

    def _draft(self, values: dict[str, Any], columns: _Columns, folder: Path, origin: str) -> Draft:
        media = {
            field: [self._media(value, field, folder) for name in names for value in _as_list(values.pop(name))]
            for field, names in columns.media.items()
        }
        # Times, dates and decimals are written as text.
        record = json.loads(json.dumps({k: v for k, v in values.items() if v is not None}, default=str))
        if columns.text:
            record["text"] = record.pop(columns.text, "")
            if "domain" not in record and not self.domain and any(columns.media.values()) and not any(media.values()):
                raise BadSample("missing_file", "a row without its image or video: --set domain=text takes it as text")
            record.setdefault("domain", self.domain or guess_domain(len(media["images"]), len(media["videos"])))
        given, notes = record, Counter[str]()
        if is_foreign_chat(record):
            record, media = normalise_nameless(record, media, notes)
        return finished(Draft(record, media["images"], media["videos"], origin), given, notes)

    def _media(self, value: Any, field: str, folder: Path) -> Media:
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, str) or (data is None and path):
            return read_media(str(data or path), folder, field, allow_outside=self.allow_outside)
        if not data:
            raise BadSample("missing_file", f"a row without the bytes of one of its {field}")
        actual_field, media = as_media(data, path)
        if actual_field != field:
            raise BadSample("unknown_extension", f"a .{media.extension} file in a column of {field}")
        return media

    def _columns(self, path: str, schema: pa.Schema) -> _Columns:
        """Find the columns to read.

        Raises:
            DataError: A column that is needed or named does not exist, or a column holds URLs.
        """
        existing = f"its columns are {', '.join(schema.names)}"
        for name in (*filter(None, [self.text]), *self.image, *self.video):
            if name not in schema.names:
                raise DataError(f"{path} has no column {name!r}: {existing}")
        media = {
            field: given or tuple(name for name in schema.names if name in _MEDIA_NAMES[field])[:1]
            for field, given in (("images", self.image), ("videos", self.video))
        }
        text = self.text or next((name for name in _TEXT_NAMES if name in schema.names), "")
        if not text and not any(name in schema.names for name in _CHAT_NAMES):
            raise DataError(f"{path}: which column is the text? Name it with --set text=NAME; {existing}")
        used = [*media["images"], *media["videos"]]
        for name in used or ([] if self.domain == "text" else schema.names):
            if name.lower() in _URL_NAMES:
                raise DataError(
                    f"{path}: column {name!r} holds URLs, and a build downloads nothing, so that it is reproducible: "
                    "download them with img2dataset and give its tars, or take the texts alone with --set domain=text"
                )
        return _Columns(text, media, [field.name for field in schema if field.name in used or _fits_json(field.type)])


@dataclass(frozen=True)
class _Columns:
    """Columns of a table."""

    text: str  # column of the text; empty in a table of chats
    media: dict[str, tuple[str, ...]]  # columns of "images" and of "videos"
    wanted: list[str]  # all columns to read


def _open(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file ({error}): copy it again") from error


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadSample]:
    """Yield the rows of a batch; a BadSample for a row that Python cannot represent.

    Examples are text that is not UTF-8, and the year 300,000.
    """
    batch = pa.RecordBatch.from_arrays([_in_microseconds(column) for column in batch.columns], batch.schema.names)
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for index in range(len(batch)):
            try:
                yield from batch.slice(index, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                yield BadSample("bad_record", f"a value that cannot be read: {error}")


def _in_microseconds(column: pa.Array) -> pa.Array:
    """Return a column with times in nanoseconds cut to microseconds, which Python has.

    Otherwise the text of a time would depend on whether pandas is installed.
    """
    kind = column.type
    if getattr(kind, "unit", "") != "ns":
        return column
    if pa.types.is_timestamp(kind):
        return column.cast(pa.timestamp("us", kind.tz), safe=False)
    return column.cast(pa.duration("us") if pa.types.is_duration(kind) else pa.time64("us"), safe=False)


def _fits_json(kind: pa.DataType) -> bool:
    """Return whether a type contains no bytes at any depth."""
    if pa.types.is_dictionary(kind):
        return _fits_json(kind.value_type)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return False
    return all(_fits_json(kind.field(index).type) for index in range(kind.num_fields))


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
