"""Parquet tables of text and images, as Hugging Face datasets write them.

An image is bytes, a struct {"bytes", "path"} or a list of these. A column of paths relative to the file works too.
Columns are found by their content, names and types, or named by the user: --set text=caption --set image=left,right;
see columns.py. All other columns are kept in the record, or counted if they hold bytes. Columns of URLs are refused:
img2dataset downloads the files and writes tars.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Media, NotRead, Rejected, Unit, credited
from data_pipeline.inputs.names import shown_names
from data_pipeline.inputs.records.chat_formats import finished, finished_rejection, is_foreign_chat, normalise_nameless
from data_pipeline.inputs.records.columns import Columns, Wanted, find_columns
from data_pipeline.inputs.records.interleaved_formats import is_foreign_interleaved, normalise_with_media
from data_pipeline.inputs.records.lazy_units import LazyUnits
from data_pipeline.inputs.records.media_values import media_of_value
from data_pipeline.inputs.records.named_media import RecordOptions
from data_pipeline.inputs.records.prompt_formats import (
    as_prompt,
    check_no_file_is_left,
    finish_prompt,
    is_prompt,
    with_boxes,
)
from data_pipeline.inputs.records.prompt_values import file_of
from data_pipeline.inputs.records.questions import as_conversation, is_question_set
from data_pipeline.inputs.records.record_fields import as_list, check_no_messages, with_texts

_ONE_ROW = {"rows": 1}
_ROWS_PER_BATCH = 32
_ROWS_PROBED = 1024  # for a value that tells what a column holds
_BUFFER = 64 << 10  # bytes; a column is read in pieces of this size, not a whole row group at once


@dataclass(frozen=True)
class Parquet(RecordOptions):
    """Parquet files. A unit is a row group; its `start` is the number of the group."""

    paths: tuple[str, ...]  # .parquet files

    def units(self) -> Sequence[Unit]:
        """Return one unit per row group with rows, and one for a table without rows.

        `extra` has the number of rows before it (`rows`) and the columns of the table.
        """
        return LazyUnits(self._units())

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the rows."""
        with open_table(unit.path) as file:
            return {"rows": file.metadata.row_group(unit.start).num_rows if unit.stop else 0}

    def read(self, unit: Unit) -> Iterator[Draft | Rejected | NotRead]:
        """Yield one sample per row. A damaged row group gives one Rejected for its remaining rows."""
        if not unit.stop:
            yield NotRead("table without rows")
            return
        shown = shown_names(self.paths)[unit.path]
        columns = Columns(**unit.extra["columns"])
        row = unit.extra["rows"]
        with open_table(unit.path) as file:
            rows = file.metadata.row_group(unit.start).num_rows
            yield from (NotRead(name, rows) for name in columns.not_read.values())
            try:
                for batch in file.iter_batches(
                    _ROWS_PER_BATCH, row_groups=[unit.start], columns=columns.wanted, use_threads=False
                ):
                    for values in rows_of(batch):
                        row += 1
                        yield from self._row(values, columns, Path(unit.path).parent, f"{shown}:{row}")
            except (pa.ArrowException, OSError) as error:  # a damaged data page: the rows after it cannot be found
                rest = {"rows": unit.extra["rows"] + rows - row}
                yield Rejected(
                    f"{shown}:{row + 1}", "damaged_file", f"the rest of row group {unit.start}: {error}", rest
                )

    def _units(self) -> Iterator[Unit]:
        wanted = Wanted(self.text, self.image, self.video, self.default_domain)
        known: dict[pa.Schema, dict[str, Any]] = {}  # tables of one schema are read alike
        has_rows = False
        for path in self.paths:
            with open_table(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
            if schema not in known:
                first = _FirstValues(path)
                known[schema] = asdict(find_columns(path, schema, wanted, first))
            rows_before = 0
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                if group.num_rows:
                    extra = {"rows": rows_before, "columns": known[schema]}
                    yield Unit(path, number, number + 1, group.total_byte_size, extra)
                rows_before += group.num_rows
            has_rows |= bool(rows_before)
            if not rows_before and len(self.paths) > 1:
                yield Unit(path)
        if not has_rows:
            raise DataError(f"{', '.join(self.paths)}: no row in it")

    def _row(
        self, values: dict[str, Any] | BadSample, columns: Columns, folder: Path, origin: str
    ) -> Iterator[Draft | Rejected]:
        try:
            if isinstance(values, BadSample):
                raise values
            yield from credited(self._drafts(values, columns, folder, origin), _ONE_ROW)
        except BadSample as error:
            rejected = Rejected(origin, error.reason, error.detail, _ONE_ROW)
            counted = isinstance(values, dict) and not is_prompt(values, columns.domain)
            yield finished_rejection(rejected, values) if counted else rejected

    def _drafts(self, values: dict[str, Any], columns: Columns, folder: Path, origin: str) -> Iterator[Draft]:
        """Yield the drafts of a row: one, or one for each of its captions."""
        found = {
            field: [value for name in names for value in as_list(values.pop(name))]
            for field, names in columns.media.items()
        }
        # Times, dates and decimals are written as text.
        record = json.loads(json.dumps({k: v for k, v in values.items() if v is not None}, default=str))
        read_as = {f"column {name}": field for field, names in columns.media.items() for name in names}
        if is_prompt(record, columns.domain):
            yield self._prompt(record, found, read_as, folder, origin)
            return
        if self.domain and not (self.domain == "chat" and is_foreign_chat(record)):
            record.setdefault("domain", self.domain)
        check_no_messages(record)
        if is_foreign_interleaved(record) and not is_question_set(record):
            record, media = normalise_with_media(record, found)
        else:
            media = found
        files = {field: [self._media(value, field, folder) for value in media[field]] for field in media}
        if is_question_set(record):
            record = as_conversation(record)
        if columns.text:
            if "domain" not in record and any(columns.media.values()) and not any(files.values()):
                raise BadSample("missing_file", "a row without its image or video: --set domain=text takes it as text")
            if columns.text != "text":
                read_as[f"column {columns.text}"] = "text"
            counts = len(files["images"]), len(files["videos"])
            record = {columns.text: "", **record}
            for number, stored, omitted in with_texts(record, columns.text, counts, self.captions, origin):
                where = f"{origin}#caption={number}" if number else origin
                omitted = {name.replace("field ", "column "): count for name, count in omitted.items()}
                yield Draft(stored, files["images"], files["videos"], where, not_read=omitted, read_as=read_as)
            return
        given, notes = record, Counter[str]()
        if is_foreign_chat(record):
            record, files = normalise_nameless(record, files, notes)
        yield finished(Draft(record, files["images"], files["videos"], origin, read_as=read_as), given, notes)

    def _prompt(
        self, record: dict[str, Any], found: dict[str, list[Any]], read_as: dict[str, str], folder: Path, origin: str
    ) -> Draft:
        """Return the draft of a row with a prompt."""
        record, names, notes = as_prompt(record, self)
        media = {
            field: [self._media(file_of(value, notes), field, folder) for value in found[field]] for field in found
        }
        check_no_file_is_left(record)
        record, media = finish_prompt(record, media, notes)
        record = with_boxes(record, media["images"])
        read_as |= {name.replace("field ", "column "): became for name, became in names.items()}
        omitted = {name.replace("field ", "column "): count for name, count in notes.items()}
        return Draft(record, media["images"], media["videos"], origin, not_read=omitted, read_as=read_as)

    def _media(self, value: Any, field: str, folder: Path) -> Media:
        return media_of_value(value, field, folder, allow_outside=self.allow_outside)


class _FirstValues:
    """Looks up the first value of a column that is not empty."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, name: str) -> Any:
        """Return the first value of a column, or entry of a list, that is not null or empty; None if none is seen."""
        rows = 0
        try:
            with open_table(self._path) as file:
                for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=[name], use_threads=False):
                    for value in batch.column(0).to_pylist():
                        if (found := _first_leaf(value)) is not None:
                            return found
                    rows += len(batch)
                    if rows >= _ROWS_PROBED:
                        break
        except (pa.ArrowException, OSError, ValueError, OverflowError):  # reading will reject it
            return None
        return None


def _first_leaf(value: Any) -> Any:
    if isinstance(value, list):
        return next((found for entry in value if (found := _first_leaf(entry)) is not None), None)
    if isinstance(value, dict) and not any(value.values()):
        return None
    return value or None


def open_table(path: str) -> pq.ParquetFile:
    """Open a table, to be read in pieces. Raises DataError."""
    try:
        return pq.ParquetFile(path, buffer_size=_BUFFER, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file ({error}): copy it again") from error


def rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadSample]:
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
