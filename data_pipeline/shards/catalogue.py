"""The catalogue of a folder of shards, and the shards that a path or URL stands for.

    shards/catalogue.arrow              the rows of all indexes of the folder, one after the other

Training opens the catalogue alone, memory-mapped, so that 10,000 shards cost one listing of their folder. Writing an
index removes the catalogue; `build` and `index` write it again at their end.
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
from common.urls import is_url, shown, url_in
from data_pipeline.errors import REJECTED, DataError
from data_pipeline.shards.arrow_file import new_arrow_file
from data_pipeline.shards.index import (
    BATCH_ROWS,
    CATALOGUE,
    FORMAT,
    INDEX_SUFFIX,
    SCHEMA,
    IndexHeader,
    ShardIndex,
    malformed_is_data_error,
    open_index,
    parse_header,
    read_arrow,
    read_index,
)
from data_pipeline.shards.members import index_command
from data_pipeline.shards.shard_cache import ShardCache, split_url


class NoShards(DataError):
    """A folder or a pattern holds no tar."""


@dataclass(frozen=True)
class ShardEntry:
    """A shard in a catalogue."""

    name: str  # of the tar
    rows: int
    header: IndexHeader


def write_catalogue(folder: Path) -> None:
    """Write the catalogue of a folder: the rows of all of its indexes, in the order of their names.

    Raises:
        DataError: An index is damaged or of another version.
    """

    def indexes() -> Iterator[ShardIndex]:
        return (open_index(tar, f"run {index_command(tar)}") for tar in tars)

    names = sorted(name.removesuffix(INDEX_SUFFIX) for name in os.listdir(folder) if name.endswith(INDEX_SUFFIX))
    tars = [folder / f"{name}.tar" for name in names]
    entries = [{"name": index.file.name, "rows": index.table.num_rows, **asdict(index.header)} for index in indexes()]
    schema = SCHEMA.with_metadata({"format": FORMAT})
    with (
        replacing(folder / CATALOGUE) as temporary,
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


def read_catalogue(path: Path, fix: str) -> tuple[list[ShardEntry], pa.Table]:
    """Return the shards of a catalogue and their rows, memory-mapped.

    Args:
        path: The catalogue.
        fix: What to do if it is damaged, for the end of the message.

    Raises:
        DataError: It is damaged or of another version.
    """
    batches, _, footer = read_arrow(path, fix)
    with malformed_is_data_error(path, fix):
        shards = [_parse_entry(fields) for fields in json.loads(footer[b"shards"])]
    table = pa.Table.from_batches(batches, SCHEMA)
    if table.num_rows != sum(shard.rows for shard in shards):
        raise DataError(f"{path} is damaged (its rows are not those of its shards): {fix}")
    return shards, table


def _parse_entry(fields: dict[str, Any]) -> ShardEntry:
    name, rows = fields.pop("name"), fields.pop("rows")
    if not isinstance(rows, int) or Path(name).name != name:
        raise TypeError(f"{name} with {rows} rows is not a shard of a folder")
    return ShardEntry(name, rows, parse_header(fields))


def find_shards(path: str) -> list[Path]:
    """Return the tars that a source's path stands for: a folder, one file, or a pattern.

    Raises:
        NoShards: There are none.
        DataError: The path, or the folder of a pattern, does not exist.
    """
    folder, names, _ = _listing(path)
    return [folder / name for name in names]


def _listing(path: str) -> tuple[Path, list[str], set[str]]:
    """Return the folder of a source, the names of its tars in order, and the names of all of the folder's files.

    An index without its tar counts as a shard, so that opening it says which one is missing.
    """
    source = Path(path)
    if source.is_dir():
        folder, pattern = source, "*.tar"
    elif source.is_file():  # even if its name looks like a pattern
        return source.parent, [source.name], set(os.listdir(source.parent))
    elif any(character in source.name for character in "*?["):
        folder, pattern = source.parent, source.name
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder: in {path} only the last part can be a pattern")
    else:
        raise DataError(f"{path} does not exist: give a folder of shards, a .tar, or a pattern of tars in a folder")
    files = set(os.listdir(folder))
    tars = {name for name in files if name.endswith(".tar")}
    tars |= {name.removesuffix(INDEX_SUFFIX) + ".tar" for name in files if name.endswith(INDEX_SUFFIX)}
    tars = {name for name in tars if not name.startswith(".")}
    names = sorted(name for name in tars if fnmatchcase(name, pattern))
    if not names and tars:
        raise NoShards(f"{path} matches none of the {len(tars)} shards in {folder}: the first is {min(tars)}")
    if not names:
        fix = f"its {REJECTED} says why" if REJECTED in files else "make some with `python -m tools.shard build`"
        raise NoShards(f"{path} holds no shards (*.tar): {fix}")
    return folder, names, files


def open_shards(path: str, cache: ShardCache) -> tuple[str, list[ShardEntry], pa.Table]:
    """Return the folder of a source, its shards in order, and their rows.

    They come from the catalogue if it holds all shards, else from the index of each shard.

    Raises:
        DataError: The path stands for no shards, or an index or catalogue cannot be used.
    """
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
    """Open the shards of a URL: of a folder, of a .tar in it, or with a pattern for its last part."""
    folder, pattern = split_url(url)
    shards, rows = _fetch_catalogue(url_in(folder, CATALOGUE), cache)
    names = {shard.name for shard in shards if fnmatchcase(shard.name, pattern)}
    if not names:
        raise DataError(
            f"{shown(url)} matches none of the {len(shards)} shards in the catalogue of {shown(folder)}"
            + (f": the first is {shards[0].name}" if shards else "")
        )
    return folder, *_chosen(shards, rows, names)


def _fetch_catalogue(url: str, cache: ShardCache) -> tuple[list[ShardEntry], pa.Table]:
    """Read a catalogue from the cache. A damaged copy is fetched once more: if that is damaged too, the original is."""
    fix = f"write {shown(url)} again"
    path = cache.catalogue(url)
    try:
        return read_catalogue(path, fix)
    except DataError:
        path.unlink(missing_ok=True)
        return read_catalogue(cache.catalogue(url), fix)


def _index_name(tar_name: str) -> str:
    return tar_name.removesuffix(".tar") + INDEX_SUFFIX


def _chosen(shards: Sequence[ShardEntry], rows: pa.Table, names: set[str]) -> tuple[list[ShardEntry], pa.Table]:
    """Return only the shards of these names and their rows, without copying."""
    if len(names) == len(shards):
        return list(shards), rows
    firsts = np.cumsum([0, *(shard.rows for shard in shards)]).tolist()
    kept = [(shard, first) for shard, first in zip(shards, firsts[:-1], strict=True) if shard.name in names]
    return [shard for shard, _ in kept], pa.concat_tables([rows.slice(first, shard.rows) for shard, first in kept])
