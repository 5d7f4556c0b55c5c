"""The first pass: each shard alone, in any process. Filters judge single samples, and set filters take features.

The results of a shard go into one small Arrow file: EXAMINED_SCHEMA and one column per SetFilter for its feature, with
one row per sample in the order of the shard's index. A shard whose file exists is not read again.
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
from data_pipeline.curation.filters import Filter, Filtered, SetFilter
from data_pipeline.curation.recipe import Recipe, recipe_of
from data_pipeline.errors import BadSample, DataError
from data_pipeline.shards.arrow_file import new_arrow_file
from data_pipeline.shards.index import read_index
from data_pipeline.shards.reader import ShardReader

CHUNK_SAMPLES = 256
CHUNK_BYTES = 1 << 28
CHUNK_PIXELS = 1 << 26  # of images, which take 200 MB when decoded
READING = -1  # stands for a filter if a sample cannot be read at all

_FINDING = pa.struct([("filter", pa.int32()), ("reason", pa.string()), ("detail", pa.string())])
EXAMINED_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("domain", pa.string()),
        ("bytes", pa.int64()),  # of its files
        ("stopped", _FINDING),  # of the first Filter that removes it; null if none does
        ("reported", pa.list_(_FINDING)),  # of filters with report_only
    ]
)


@dataclass(frozen=True)
class ShardTask:
    """One shard to examine."""

    shard: str  # path of the tar
    shown: str  # its name in reports
    recipe: str  # the text of the recipe
    out: str  # the file to write

    def __str__(self) -> str:
        """Return its name in messages."""
        return str(self.shard)

    @property
    def done(self) -> bool:
        """Whether the shard has been examined."""
        return Path(self.out).is_file()


@dataclass(frozen=True)
class Entry:
    """A sample of a shard."""

    key: str
    domain: str
    bytes: int  # of its members
    sample: Candidate | Filtered  # or why it cannot be read


def examine_shard(task: ShardTask) -> None:
    """Write the task's file, unless it exists."""
    if task.done:
        return
    recipe = _recipe(task.recipe)
    schema = examined_schema(recipe)
    with replacing(Path(task.out)) as temporary, new_arrow_file(temporary, schema) as writer:
        for chunk in _chunks(Path(task.shard), task.shown):
            writer.write_batch(pa.RecordBatch.from_pylist(examine(chunk, recipe), schema))


def examined_schema(recipe: Recipe) -> pa.Schema:
    """Return EXAMINED_SCHEMA with the features of a recipe's set filters."""
    features = [
        pa.field(feature_column(position), step.feature_type)
        for position, (_, step) in enumerate(recipe.filters)
        if isinstance(step, SetFilter)
    ]
    return pa.schema([*EXAMINED_SCHEMA, *features])


def feature_column(position: int) -> str:
    """Return the name of the column for the feature of a set filter, by its position in the recipe."""
    return f"feature_{position}"


def examine(entries: Sequence[Entry], recipe: Recipe) -> list[dict[str, Any]]:
    """Return one row of examined_schema per sample. A filter sees the samples that every Filter before it kept."""
    rows: list[dict[str, Any]] = []
    remaining: list[tuple[dict[str, Any], Candidate]] = []
    for entry in entries:
        row: dict[str, Any] = {
            "key": entry.key,
            "domain": entry.domain,
            "bytes": entry.bytes,
            "stopped": None,
            "reported": [],
        }
        rows.append(row)
        if isinstance(entry.sample, Filtered):
            row["stopped"] = _finding(READING, entry.sample)
        else:
            remaining.append((row, entry.sample))
    for position, (name, step) in enumerate(recipe.filters):
        try:
            verdicts = _judge(step, position, remaining)
        except DataError:
            raise
        except Exception as error:  # of a library, or of a user's own filter
            where = f"{remaining[0][1].name} to {remaining[-1][1].name}"
            raise DataError(f"filter {name}, {where}: {type(error).__name__}: {error}") from error
        for (row, _), verdict in zip(remaining, verdicts, strict=True):
            if verdict is not None and step.report_only:
                row["reported"].append(_finding(position, verdict))
            elif verdict is not None:
                row["stopped"] = _finding(position, verdict)
        remaining = [(row, sample) for row, sample in remaining if row["stopped"] is None]
    return rows


def _judge(
    step: Filter | SetFilter, position: int, samples: list[tuple[dict[str, Any], Candidate]]
) -> list[Filtered | None]:
    if isinstance(step, Filter):
        return step.judge([sample for _, sample in samples])
    verdicts: list[Filtered | None] = []
    for row, sample in samples:
        try:
            row[feature_column(position)] = step.feature(sample) if step.judges(sample) else None
            verdicts.append(None)
        except BadSample as error:
            verdicts.append(Filtered(error.reason, error.detail))
    return verdicts


def _finding(position: int, filtered: Filtered) -> dict[str, Any]:
    return {"filter": position, "reason": filtered.reason, "detail": filtered.detail}


@lru_cache(maxsize=1)
def _recipe(text: str) -> Recipe:
    """Return the recipe, parsed once per process: some filters read large files."""
    return recipe_of(text)


def _chunks(shard: Path, shown: str) -> Iterator[list[Entry]]:
    """Yield the samples of a shard, as many at a time as may be decoded at once."""
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
    """Yield samples of a shard in the order of its index.

    Args:
        shard: Path of the tar.
        shown: Its name in reports.
        rows: The samples to read; None for all.
    """
    index = read_index(shard)
    columns = index.table.select(["key", "domain"])
    reader = ShardReader()
    try:
        for row in range(index.table.num_rows) if rows is None else rows:
            stored = index.sample(row)
            key, domain = (columns.column(name)[row].as_py() for name in ("key", "domain"))
            sample: Candidate | Filtered
            try:
                sample = Candidate(f"{shown}/{key}", reader.read(str(shard), stored))
            except BadSample as error:
                sample = Filtered(error.reason, error.detail)
            yield Entry(key, domain, sum(member.size for member in stored.members), sample)
    finally:
        reader.close()


def _pixels(sample: Candidate | Filtered) -> int:
    if isinstance(sample, Filtered):
        return 0
    try:
        return sum(height * width for height, width in sample.sizes)
    except BadSample:  # the first filter that decodes its images reports this
        return 0
