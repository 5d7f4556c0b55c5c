"""The catalogue of a folder of shards, and the shards that a path or URL stands for.

    shards/catalogue.arrow              the rows of all indexes of the folder, one after the other

A catalogue holds what `index` says of every shard. Training opens it alone, memory-mapped, so that 10,000 shards cost
one listing of their folder. Whoever writes an index removes the catalogue, and `write_catalogue` makes it anew at the
end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import pyarrow as pa

from common.files import replacing
from data_pipeline.errors import DataError
from data_pipeline.shards.arrow_file import new_arrow_file
from data_pipeline.shards.index import (
    BATCH_ROWS,
    CATALOGUE,
    FORMAT,
    INDEX_SUFFIX,
    SCHEMA,
    IndexHeader,
    ShardIndex,
    header_of,
    open_index,
    read_arrow,
    read_index,
    well_formed,
)
from data_pipeline.shards.members import index_command
from data_pipeline.shards.shard_cache import ShardCache, is_url, shown, split_url, url_in

REJECTED = "rejected.jsonl"  # that a build and the indexing of shards leave beside them


class NoShards(DataError):
    """A folder, or a pattern, without a single tar."""


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the catalogue knows it. name: of the tar; rows: how many."""

    name: str
    rows: int
    header: IndexHeader


def write_catalogue(folder: Path) -> None:
    """Puts the rows of all indexes of a folder, in the order of their names, into its catalogue. Raises DataError if an
    index is damaged or of another version."""

    def indexes() -> Iterator[ShardIndex]:
        return (open_index(tar, f"run {index_command(tar)}") for tar in tars)

    names = sorted(name.removesuffix(INDEX_SUFFIX) for name in os.listdir(folder) if name.endswith(INDEX_SUFFIX))
    tars = [folder / f"{name}.tar" for name in names]
    entries = [{"name": index.file.name, "rows": index.table.num_rows, **asdict(index.header)} for index in indexes()]
    schema = SCHEMA.with_metadata({"format": FORMAT})
    with (
        replacing(folder / CATALOGUE) as temporary,  # two machines may end at once
        new_arrow_file(temporary, schema, {"shards": json.dumps(entries)}) as writer,
    ):
        waiting: list[pa.Table] = []  # small shards share a batch
        for index in indexes():
            waiting.append(index.table)
            if sum(table.num_rows for table in waiting) >= BATCH_ROWS:
                writer.write_table(pa.concat_tables(waiting).combine_chunks(), max_chunksize=BATCH_ROWS)
                waiting.clear()
        if waiting:
            writer.write_table(pa.concat_tables(waiting).combine_chunks(), max_chunksize=BATCH_ROWS)


def read_catalogue(path: Path, mend: str) -> tuple[list[ShardEntry], pa.Table]:
    """The shards of a catalogue and their rows (memory-mapped). Raises DataError if it is damaged."""
    batches, _, footer = read_arrow(path, mend)
    with well_formed(path, mend):
        shards = [_entry(given) for given in json.loads(footer[b"shards"])]
    table = pa.Table.from_batches(batches, SCHEMA)
    if table.num_rows != sum(shard.rows for shard in shards):
        raise DataError(f"{path} is damaged (its rows are not those of its shards): {mend}")
    return shards, table


def _entry(given: dict[str, Any]) -> ShardEntry:
    """Raises one of the errors of `well_formed` if it is none."""
    name, rows = given.pop("name"), given.pop("rows")
    if not isinstance(rows, int) or Path(name).name != name:
        raise TypeError(f"{name} with {rows} rows is no shard of a folder")
    return ShardEntry(name, rows, header_of(given))


def find_shards(path: str) -> list[Path]:
    """The tars that a source's path stands for: a folder, one file, or a pattern. Raises DataError if there is none."""
    folder, names, _ = _listing(path)
    return [folder / name for name in names]


def _listing(path: str) -> tuple[Path, list[str], set[str]]:
    """The folder of a source, the names of its tars in order, and the names of all of the folder's files.

    An index without its tar counts as a shard, so that whoever opens it can say which one is missing.
    """
    given = Path(path)
    if given.is_dir():
        folder, pattern = given, "*.tar"
    elif given.is_file():  # whatever its name holds
        return given.parent, [given.name], set(os.listdir(given.parent))
    elif any(character in given.name for character in "*?["):
        folder, pattern = given.parent, given.name
    else:
        raise DataError(f"{path} does not exist: give a folder of shards, a .tar or a pattern")
    files = set(os.listdir(folder)) if folder.is_dir() else set()
    tars = {name for name in files if name.endswith(".tar")}
    tars |= {name.removesuffix(INDEX_SUFFIX) + ".tar" for name in files if name.endswith(INDEX_SUFFIX)}
    names = sorted(name for name in tars if fnmatchcase(name, pattern) and not name.startswith("."))
    if not names:
        mend = f"its {REJECTED} says why" if REJECTED in files else "make some with `python -m tools.shard build`"
        raise NoShards(f"{path} holds no shards (*.tar): {mend}")
    return folder, names, files


def open_shards(path: str, cache: ShardCache) -> tuple[str, list[ShardEntry], pa.Table]:
    """The folder of a source, its shards in order, and their rows: from the catalogue where it knows all of them, else
    from the index of each."""
    if is_url(path):
        return _open_remote(path, cache)
    folder, names, files = _listing(path)
    if not names[0].endswith(".tar"):
        raise DataError(
            f"{path} is not a shard: make some with `python -m tools.shard build --input {quote(path)} ...`"
        )
    if CATALOGUE in files:
        shards, rows = read_catalogue(folder / CATALOGUE, f"run {index_command(folder)}")
        present = {shard.name for shard in shards if {shard.name, _index_name(shard.name)} <= files}
        if present.issuperset(names):
            return str(folder), *_chosen(shards, rows, set(names))
    indexes = [read_index(folder / name) for name in names]
    shards = [ShardEntry(index.file.name, index.table.num_rows, index.header) for index in indexes]
    return str(folder), shards, pa.concat_tables([index.table for index in indexes])


def _open_remote(url: str, cache: ShardCache) -> tuple[str, list[ShardEntry], pa.Table]:
    """The same for a URL: of a folder, of a .tar in it, or with a pattern for its last part."""
    folder, pattern = split_url(url)
    shards, rows = _fetch_catalogue(url_in(folder, CATALOGUE), cache)
    names = {shard.name for shard in shards if fnmatchcase(shard.name, pattern)}
    if not names:
        raise DataError(
            f"{shown(url)} stands for none of the {len(shards)} shards in the catalogue of {shown(folder)}: the first "
            f"is {shards[0].name if shards else 'missing'}"
        )
    return folder, *_chosen(shards, rows, names)


def _fetch_catalogue(url: str, cache: ShardCache) -> tuple[list[ShardEntry], pa.Table]:
    """A catalogue by way of the cache. A copy that is damaged is fetched once more before the original is blamed."""
    mend = f"write {shown(url)} anew"
    path = cache.catalogue(url)
    try:
        return read_catalogue(path, mend)
    except DataError:
        path.unlink(missing_ok=True)
        return read_catalogue(cache.catalogue(url), mend)


def _index_name(tar_name: str) -> str:
    return tar_name.removesuffix(".tar") + INDEX_SUFFIX


def _chosen(shards: Sequence[ShardEntry], rows: pa.Table, names: set[str]) -> tuple[list[ShardEntry], pa.Table]:
    """Only the shards of these names. Nothing is copied."""
    if len(names) == len(shards):
        return list(shards), rows
    firsts = np.cumsum([0, *(shard.rows for shard in shards)]).tolist()
    kept = [(shard, first) for shard, first in zip(shards, firsts[:-1], strict=True) if shard.name in names]
    return [shard for shard, _ in kept], pa.concat_tables([rows.slice(first, shard.rows) for shard, first in kept])
