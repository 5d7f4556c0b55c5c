"""The first pass: every shard alone, in any process. Filters of single samples judge, and comparing ones take features.

What is found goes into one small Arrow file a shard: EXAMINED_SCHEMA, and a column for the feature of every SetFilter;
one row a sample, in the order of the shard's index. A shard whose file is there is not read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.files import replacing
from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.filters import Drop, Filter, SetFilter
from data_pipeline.curation.recipe import Recipe, recipe_of
from data_pipeline.errors import BadSample, DataError
from data_pipeline.shards.arrow_file import new_arrow_file
from data_pipeline.shards.index import read_index
from data_pipeline.shards.reader import ShardReader

CHUNK_SAMPLES = 256
CHUNK_BYTES = 1 << 28
CHUNK_PIXELS = 1 << 26  # of pictures, which take 200 MB when they are decoded
READING = -1  # the number of the filter where a sample cannot be read at all

_FINDING = pa.struct([("filter", pa.int32()), ("reason", pa.string()), ("detail", pa.string())])
EXAMINED_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("domain", pa.string()),
        ("bytes", pa.int64()),  # of its files
        ("stopped", _FINDING),  # the first filter of single samples that drops it; null if none does
        ("reported", pa.list_(_FINDING)),  # what filters say that only report
    ]
)


@dataclass(frozen=True)
class ShardTask:
    """One shard to examine. shown: its name in reports; recipe: its text; out: the file to write."""

    shard: str
    shown: str
    recipe: str
    out: str

    def __str__(self) -> str:
        return str(self.shard)

    @property
    def done(self) -> bool:
        return Path(self.out).is_file()


@dataclass(frozen=True)
class Entry:
    """A sample of a shard, or why it cannot be read."""

    key: str
    domain: str
    bytes: int
    sample: Candidate | Drop


def examine_shard(task: ShardTask) -> None:
    """Writes the task's file, unless it is there."""
    if task.done:
        return
    recipe = _recipe(task.recipe)
    schema = examined_schema(recipe)
    with replacing(Path(task.out)) as temporary, new_arrow_file(temporary, schema) as writer:
        for chunk in _chunks(Path(task.shard), task.shown):
            writer.write_batch(pa.RecordBatch.from_pylist(examine(chunk, recipe), schema))


def examined_schema(recipe: Recipe) -> pa.Schema:
    features = [
        pa.field(feature_column(position), step.feature_type)
        for position, (_, step) in enumerate(recipe.filters)
        if isinstance(step, SetFilter)
    ]
    return pa.schema([*EXAMINED_SCHEMA, *features])


def feature_column(position: int) -> str:
    return f"feature_{position}"


def examine(entries: Sequence[Entry], recipe: Recipe) -> list[dict[str, Any]]:
    """A row of examined_schema for every sample. Filters see what all single-sample filters before them let through."""
    rows: list[dict[str, Any]] = []
    alive: list[tuple[dict[str, Any], Candidate]] = []
    for entry in entries:
        row: dict[str, Any] = {
            "key": entry.key,
            "domain": entry.domain,
            "bytes": entry.bytes,
            "stopped": None,
            "reported": [],
        }
        rows.append(row)
        if isinstance(entry.sample, Drop):
            row["stopped"] = _finding(READING, entry.sample)
        else:
            alive.append((row, entry.sample))
    for position, (name, step) in enumerate(recipe.filters):
        try:
            verdicts = _judge(step, position, alive)
        except DataError:
            raise
        except Exception as error:  # of a library, or of a user's own filter
            place = f"{alive[0][1].name} to {alive[-1][1].name}"
            raise DataError(f"filter {name}, {place}: {type(error).__name__}: {error}") from error
        for (row, _), verdict in zip(alive, verdicts, strict=True):
            if verdict is not None and step.report_only:
                row["reported"].append(_finding(position, verdict))
            elif verdict is not None:
                row["stopped"] = _finding(position, verdict)
        alive = [(row, sample) for row, sample in alive if row["stopped"] is None]
    return rows


def _judge(step: Filter | SetFilter, position: int, alive: list[tuple[dict[str, Any], Candidate]]) -> list[Drop | None]:
    if isinstance(step, Filter):
        return step.judge([sample for _, sample in alive])
    verdicts: list[Drop | None] = []
    for row, sample in alive:
        try:
            row[feature_column(position)] = step.feature(sample) if step.judges(sample) else None
            verdicts.append(None)
        except BadSample as error:
            verdicts.append(Drop(error.reason, error.detail))
    return verdicts


def _finding(position: int, drop: Drop) -> dict[str, Any]:
    return {"filter": position, "reason": drop.reason, "detail": drop.detail}


@lru_cache(maxsize=1)
def _recipe(text: str) -> Recipe:
    """Once a process: some filters read large files."""
    return recipe_of(text)


def _chunks(shard: Path, shown: str) -> Iterator[list[Entry]]:
    """The samples of a shard, so many at a time as may be decoded at once."""
    chunk: list[Entry] = []
    size = pixels = 0
    for entry in read_entries(shard, shown):
        chunk.append(entry)
        size += entry.bytes
        pixels += _pixels(entry.sample)
        if len(chunk) == CHUNK_SAMPLES or size >= CHUNK_BYTES or pixels >= CHUNK_PIXELS:
            yield chunk
            chunk, size, pixels = [], 0, 0
    if chunk:
        yield chunk


def read_entries(shard: Path, shown: str, rows: Iterable[int] | None = None) -> Iterator[Entry]:
    """These samples of a shard, or all, in the order of its index."""
    index = read_index(shard)
    columns = index.table.select(["key", "domain"])
    reader = ShardReader()
    try:
        for row in range(index.table.num_rows) if rows is None else rows:
            stored = index.sample(row)
            key, domain = (columns.column(name)[row].as_py() for name in ("key", "domain"))
            sample: Candidate | Drop
            try:
                sample = Candidate(f"{shown}/{key}", reader.read(str(shard), stored))
            except BadSample as error:
                sample = Drop(error.reason, error.detail)
            yield Entry(key, domain, sum(member.size for member in stored.members), sample)
    finally:
        reader.close()


def _pixels(sample: Candidate | Drop) -> int:
    if isinstance(sample, Drop):
        return 0
    try:
        return sum(height * width for height, width in sample.sizes)
    except BadSample:  # the first filter that looks at its pictures says so
        return 0
