"""Indexes and catalogues that are damaged, of another version or malformed."""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import xxhash

from data_pipeline.errors import DataError
from data_pipeline.shards.arrow_file import new_arrow_file
from data_pipeline.shards.catalogue import read_catalogue, write_catalogue
from data_pipeline.shards.index import CATALOGUE, FORMAT, index_path, read_index, write_index


def in_memory(table: pa.Table) -> pa.Table:
    """Return a copy of rows that stays when their file is written again."""
    return pa.Table.from_pylist(table.to_pylist(), table.schema)


@pytest.mark.fast
def test_index_of_another_version_is_an_error(shards):
    tar = shards / "shard-00000-00000.tar"
    table = in_memory(read_index(tar).table).replace_schema_metadata({"format": "glmv-index-0"})
    with new_arrow_file(index_path(tar), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="was not written by this version"):
        read_index(tar)


@pytest.mark.fast
def test_file_that_cannot_be_read_is_not_called_damaged(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\): make it a readable file, or the fix"):
        read_catalogue(tmp_path, "the fix")


@pytest.mark.fast
def test_full_disk_leaves_the_old_files_and_nothing_else(shards, opened):
    """A limit of the size of files stops the writing half way."""
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    index = read_index(shards / "shard-00000-00000.tar")
    rows, header = index.table.to_pylist(), index.header
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_index(index.file, rows, tokenizer_hash=header.tokenizer_hash, chat_form=header.chat_form)
        with pytest.raises(OSError, match="File too large"):
            write_catalogue(shards)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before


def outcomes_of_damage(folder: Path, name: str, times: int) -> Counter[str]:
    """Read one file of a folder completely, with flipped bits, cut short or partly zeros each time."""

    def content() -> Any:
        if name == CATALOGUE:
            shards, rows = read_catalogue(folder / name, "the fix")
            return shards, rows.to_pylist()
        index = read_index(folder / name.replace(".index.arrow", ".tar"))
        return index.header, index.table.to_pylist()

    rng = random.Random(name)
    intact, expected = (folder / name).read_bytes(), content()
    outcomes: Counter[str] = Counter()
    for number in range(times):
        damaged = bytearray(intact)
        position = rng.randrange(len(intact))
        if number % 4 == 0:
            del damaged[position:]
        elif number % 4 == 1:
            damaged[position : position + 64] = bytes(len(damaged[position : position + 64]))
        else:
            damaged[position] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(damaged)
        try:
            outcomes["same" if content() == expected else "other rows"] += 1
        except DataError:
            outcomes["DataError"] += 1
        except Exception as error:
            outcomes[type(error).__name__] += 1
    (folder / name).write_bytes(intact)
    return outcomes


@pytest.mark.parametrize("times", [400, pytest.param(5000, marks=pytest.mark.slow)])
def test_damage_is_an_error_and_never_a_crash(shards, times):
    """In a separate process, as Arrow crashes its process when it reads damaged data."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for name in (CATALOGUE, "shard-00000-00000.index.arrow"):
            outcomes = pool.submit(outcomes_of_damage, shards, name, times).result()
            assert set(outcomes) <= {"DataError", "same"}, outcomes
            assert outcomes["DataError"] > 0.8 * times  # zeros over zeros change nothing


@pytest.mark.fast
def test_malformed_content_with_a_correct_checksum_is_an_error(shards):
    tar, catalogue = shards / "shard-00000-00000.tar", shards / CATALOGUE
    table = in_memory(read_index(tar).table)
    header = json.dumps(asdict(read_index(tar).header))
    strange = table.set_column(2, "text_tokens", table.column("text_tokens").cast(pa.string()))
    for rows, message in (
        (table.replace_schema_metadata({"format": FORMAT}), "header"),
        (table.replace_schema_metadata({"format": FORMAT, "header": "[1]"}), "TypeError"),
        (table.replace_schema_metadata({"format": FORMAT, "header": "{"}), "JSONDecodeError"),
        (table.replace_schema_metadata({"format": FORMAT, "header": "[" * 100_000}), "RecursionError"),
        (table.replace_schema_metadata({"format": FORMAT, "header": '{"tar_fingerprint": 3}'}), "TypeError"),
        (strange.replace_schema_metadata({"format": FORMAT, "header": header}), "columns"),
        (table.replace_schema_metadata(None), "not written by this version"),
    ):
        with new_arrow_file(index_path(tar), rows.schema) as writer:
            writer.write_table(rows)
        with pytest.raises(DataError, match=f"index.arrow .*{message}.*: run `python"):
            read_index(tar)
    entry = {"name": tar.name, "rows": table.num_rows, **json.loads(header)}
    for footer in (
        None,
        {"shards": "{}"},
        {"shards": "3"},
        {"shards": json.dumps([tar.name])},
        {"shards": json.dumps([{**entry, "rows": "5"}])},
        {"shards": json.dumps([{**entry, "name": "../../etc/passwd"}])},
        {"shards": json.dumps([{**entry, "tar_fingerprint": "long"}])},
        {"shards": json.dumps([entry, entry])},
    ):
        rows = table.replace_schema_metadata({"format": FORMAT})
        with new_arrow_file(catalogue, rows.schema, footer) as writer:
            writer.write_table(rows)
        with pytest.raises(DataError, match=r"catalogue.arrow is damaged .*: the fix"):
            read_catalogue(catalogue, "the fix")


@pytest.mark.fast
def test_other_programs_read_the_file_without_its_last_16_bytes(shards):
    data = index_path(shards / "shard-00000-00000.tar").read_bytes()
    assert pa.ipc.open_file(data[:-16]).read_all().equals(read_index(shards / "shard-00000-00000.tar").table)
    assert data[-16:] == b"xxh3sum\n" + xxhash.xxh3_64(data[:-16]).digest()
