"""Indexes: exact lengths without decoding, and indexes that do not fit their shard, tokenizer or version."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.encode import PixelBudget, encode_record
from data_pipeline.errors import DataError
from data_pipeline.index import Source, find_shards, index_path, read_index
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.shards import ShardReader, ShardWriter
from data_pipeline.tokens import GlmTokenizer


@pytest.fixture
def shards(shard_folders, tmp_path) -> Path:
    return Path(shutil.copytree(shard_folders[1], tmp_path / "shards"))


@pytest.mark.parametrize("budget", [PixelBudget(6144, 30000), PixelBudget(9, 60), PixelBudget(30, 20)])
def test_lengths_from_metadata_equal_lengths_of_decoded_samples(shard_folders, tokenizer, budget):
    source = Source(SourceConfig(str(shard_folders[1])), tokenizer_hash=tokenizer.hash, budget=budget)
    reader = ShardReader()
    assert len(source) == 40
    for row in range(len(source)):
        stored = source.sample(row)
        raw = reader.read(stored.shard, stored.sample)
        encoded = encode_record(raw.record, raw.images, raw.videos, tokenizer=tokenizer, budget=budget)
        assert len(encoded) == source.lengths[row]
        assert (encoded.domain == "text") == source.is_text[row]


@pytest.mark.fast
def test_find_shards(shards, tmp_path):
    names = [path.name for path in find_shards(str(shards))]
    assert names == sorted(names)
    assert len(names) > 1
    assert [path.name for path in find_shards(str(shards / "*00001.tar"))] == ["shard-00000-00001.tar"]
    assert [path.name for path in find_shards(str(shards / "shard-00000-00000.tar"))] == ["shard-00000-00000.tar"]
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_shards(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no shards .*tools\.shard build"):
        find_shards(str(tmp_path / "empty"))


@pytest.mark.fast
def test_a_missing_shard(shards, tokenizer):
    (shards / "shard-00000-00001.tar").unlink()
    with pytest.raises(
        DataError, match=r"shard-00000-00001\.tar is missing although shard-00000-00001\.index\.arrow is there: restore"
    ):
        Source(SourceConfig(str(shards)), tokenizer_hash=tokenizer.hash, budget=PixelBudget())


@pytest.mark.fast
def test_a_shard_without_an_index(shards):
    tar = shards / "shard-00000-00001.tar"
    index_path(tar).unlink()
    with pytest.raises(
        DataError, match=r"shard-00000-00001.tar has no index: run `python -m tools.shard index .*shard-00000-00001"
    ):
        read_index(tar)


@pytest.mark.fast
def test_an_index_older_than_its_shard(shards, tokenizer):
    first, second = shards / "shard-00000-00000.tar", shards / "shard-00000-00001.tar"
    shutil.copy(second, first)
    with pytest.raises(DataError, match=r"shard-00000-00000.index.arrow is older than its shard, .* run `python"):
        read_index(first)
    index_shards([first], tokenizer=tokenizer.folder)
    assert read_index(first).table.num_rows == read_index(second).table.num_rows


@pytest.mark.fast
def test_a_copied_data_set_may_bear_any_dates(shards):
    tar = shards / "shard-00000-00000.tar"
    os.utime(index_path(tar), (0, 0))
    assert read_index(tar).table.num_rows


@pytest.mark.fast
def test_an_index_made_with_another_tokenizer(shards, tokenizer):
    with pytest.raises(DataError, match=r"index of .*shard-00000-00000.tar was made with another tokenizer: run"):
        Source(SourceConfig(str(shards)), tokenizer_hash="0" * 16, budget=PixelBudget())
    index_shards(find_shards(str(shards)))
    with pytest.raises(DataError, match="was made with no tokenizer"):
        Source(SourceConfig(str(shards)), tokenizer_hash=tokenizer.hash, budget=PixelBudget())


@pytest.mark.fast
def test_a_damaged_index(shards):
    tar = shards / "shard-00000-00000.tar"
    data = index_path(tar).read_bytes()
    for damaged in (b"", data[: len(data) // 2], b"hello"):
        index_path(tar).write_bytes(damaged)
        with pytest.raises(DataError, match=r"index.arrow is damaged .*: run `python -m tools.shard index"):
            read_index(tar)


@pytest.mark.fast
def test_an_index_of_another_version(shards):
    tar = shards / "shard-00000-00000.tar"
    table = read_index(tar).table.replace_schema_metadata({"format": "glmv-index-0"})
    with pa.OSFile(str(index_path(tar)), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="was not written by this version"):
        read_index(tar)


@pytest.mark.fast
def test_a_shard_in_which_nothing_can_be_used(shards, tokenizer):
    writer = ShardWriter(shards, "bad", max_bytes=1000)
    writer.write("0", [("json", b"{}")])
    writer.close()
    counts = index_shards(writer.finished, tokenizer=tokenizer.folder)
    assert counts.rejected == {"bad_record": 1}
    source = Source(SourceConfig(str(shards)), tokenizer_hash=tokenizer.hash, budget=PixelBudget())
    assert len(source) == len(source.lengths) == len(source.is_text) == 40
    assert source.sample(0).shard_name == "shard-00000-00000.tar"


@pytest.mark.fast
def test_indexes_do_not_use_up_file_descriptors(shards):
    tar = shards / "shard-00000-00000.tar"
    before = len(os.listdir("/proc/self/fd"))
    opened = [read_index(tar) for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) - before < 10
    assert {index.sample(0).key for index in opened} == {opened[0].sample(0).key}


@pytest.mark.fast
def test_the_fingerprint_of_a_source_follows_its_samples(shards, tokenizer: GlmTokenizer):
    def fingerprint(**budget: int) -> str:
        source = Source(SourceConfig(str(shards)), tokenizer_hash=tokenizer.hash, budget=PixelBudget(**budget))
        return source.fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(image_max_tokens=9) != first
    for path in shards.glob("shard-00000-00001.*"):
        path.unlink()
    assert fingerprint() != first
