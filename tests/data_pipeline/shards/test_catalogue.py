"""Catalogues: what the indexes say, read once; which shards a path stands for."""

from __future__ import annotations

import multiprocessing
import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest

from benchmarks.indexing import in_new_process, write_folder
from data_pipeline.errors import BadSample, DataError
from data_pipeline.loading.source import Source
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.shards.catalogue import find_shards, write_catalogue
from data_pipeline.shards.index import CATALOGUE, index_path, read_index, write_index
from data_pipeline.shards.reader import ShardReader


def same(one: Source, other: Source) -> bool:
    columns = ("lengths", "patches", "patches_squared", "is_text", "shard_rows")
    assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in columns)
    for row in range(len(one)):
        assert one.sample(row) == other.sample(row)
        assert one.domain_of(row) == other.domain_of(row)
        assert one.blocks(row) == other.blocks(row)
    return one.fingerprint == other.fingerprint


@pytest.mark.fast
def test_find_shards_of_folders_patterns_and_files(shards, tmp_path):
    names = [path.name for path in find_shards(str(shards))]
    assert names == sorted(names)
    assert len(names) > 1
    assert [path.name for path in find_shards(str(shards / "*00001.tar"))] == ["shard-00000-00001.tar"]
    assert [path.name for path in find_shards(str(shards / "shard-00000-00000.tar"))] == ["shard-00000-00000.tar"]
    odd = shards / "odd [1] 図.tar"
    (shards / "shard-00000-00000.tar").rename(odd)
    assert find_shards(str(odd)) == [odd], "an existing file is not a pattern"
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_shards(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"/s\* is not a folder: in .*/x-\*\.tar only the last part can be a pattern"):
        find_shards(str(tmp_path / "s*" / "x-*.tar"))
    with pytest.raises(DataError, match=r"other-\*\.tar matches none of the \d+ shards in .*: the first is odd"):
        find_shards(str(shards / "other-*.tar"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no shards .*tools\.shard build"):
        find_shards(str(tmp_path / "empty"))
    (tmp_path / "empty" / "rejected.jsonl").touch()
    with pytest.raises(DataError, match=r"holds no shards .*its rejected\.jsonl says why"):
        find_shards(str(tmp_path / "empty"))


@pytest.mark.fast
def test_source_that_is_not_a_shard_is_an_error(shards, opened):
    (shards / "my records.jsonl").touch()
    with pytest.raises(DataError, match=r"is not a shard: .* build --input '.*my records\.jsonl'"):
        opened("my records.jsonl")


@pytest.mark.fast
@pytest.mark.parametrize("pattern", ["", "*.tar", "shard-00000-00001.tar", "shard-00000-0000[02].tar", "*1.tar"])
def test_catalogue_equals_the_indexes(shards, opened, pattern):
    from_catalogue = opened(pattern)
    (shards / CATALOGUE).unlink()
    assert same(from_catalogue, opened(pattern))
    write_catalogue(shards)
    assert same(from_catalogue, opened(pattern))


@pytest.mark.fast
def test_source_with_a_catalogue_reads_neither_tars_nor_indexes(shards, opened):
    before = opened()
    for path in shards.iterdir():
        if path.name != CATALOGUE:
            path.write_bytes(b"?")
    assert opened().fingerprint == before.fingerprint
    sample = before.sample(0)
    with pytest.raises(BadSample, match=r"unreadable_shard: .*-00000\.tar has 1 bytes and is not what was indexed"):
        ShardReader().read(sample.shard, sample.sample, sample.tar_fingerprint)


@pytest.mark.fast
def test_catalogue_that_lacks_a_shard_is_not_used(shards, opened, tokenizer):
    whole = opened()
    late = shutil.copy(shards / "shard-00000-00000.tar", shards / "zlate.tar")
    with pytest.raises(DataError, match=r"zlate\.tar has no index"):
        opened()
    assert same(opened("shard-*.tar"), whole)
    shutil.copy(index_path(shards / "shard-00000-00000.tar"), index_path(Path(late)))
    assert len(opened()) == len(whole) + int(whole.shard_rows[1]), "read from the index of the copy"
    index_shards([Path(late)], tokenizer="")
    with pytest.raises(DataError, match=r"zlate\.tar was made with no tokenizer"):
        opened()
    index_shards([Path(late)], tokenizer=tokenizer.folder)
    assert len(opened()) == len(whole) + int(whole.shard_rows[1])


@pytest.mark.fast
def test_write_index_removes_the_catalogue(shards, opened):
    index = read_index(shards / "shard-00000-00000.tar")
    write_index(
        index.file,
        index.table.slice(1).to_pylist(),
        tokenizer_hash=index.header.tokenizer_hash,
        chat_form=index.header.chat_form,
    )
    assert not (shards / CATALOGUE).exists(), "it is out of date until the new one is written"
    assert len(opened()) == 39


@pytest.mark.fast
def test_damaged_catalogue_is_an_error(shards, opened):
    data = (shards / CATALOGUE).read_bytes()
    for damaged in (b"", data[: len(data) // 2], b"hello", data[:-300] + bytes(300)):
        (shards / CATALOGUE).write_bytes(damaged)
        with pytest.raises(DataError, match=r"catalogue.arrow is damaged .*: run `python -m tools.shard index"):
            opened()


@pytest.mark.fast
def test_source_is_pickled_as_its_configuration(opened):
    source = opened()
    here, there = multiprocessing.Pipe()
    here.send(source)
    assert len(ForkingPickler.dumps(source)) < 1000
    received = there.recv()
    assert received is not source
    assert same(received, source)


@pytest.mark.slow
def test_million_samples_open_within_a_second_and_100_megabytes(tmp_path):
    write_folder(tmp_path, samples=1_000_000, shards=10_000)
    figures = in_new_process(tmp_path)
    assert (figures["samples"], figures["shards"]) == (1_000_000, 10_000)
    assert figures["CPU seconds"] < 1
    assert figures["MB anonymous"] + figures["MB mapped"] < 100
