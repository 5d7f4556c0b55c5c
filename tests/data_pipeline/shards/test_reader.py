"""Samples read in any order: changed bytes, missing and replaced shards, bad records."""

from __future__ import annotations

import pytest

from data_pipeline.errors import BadSample
from data_pipeline.shards.members import ShardSample
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.scan import scan_shard
from data_pipeline.shards.tar import fingerprint
from data_pipeline.shards.writer import ShardWriter
from tests.data_pipeline.shards.shard_files import FILES, RECORD, open_files, read_all

pytestmark = pytest.mark.fast


def test_changed_bytes_are_detected(shard):
    samples = scan_shard(shard).samples
    offset = samples[2].members[1].offset
    with open(shard, "r+b") as file:
        file.seek(offset + 30)
        file.write(b"\xff\x00\xff")
    reader = ShardReader()
    assert reader.read(str(shard), samples[1]).images
    with pytest.raises(BadSample, match="checksum: its image of"):
        reader.read(str(shard), samples[2])


def test_missing_shortened_and_replaced_shards_are_unreadable(shard, tmp_path):
    samples = scan_shard(shard).samples
    indexed = fingerprint(shard)
    with pytest.raises(BadSample, match=r"unreadable_shard: .*nowhere\.tar cannot be opened .*: restore it"):
        ShardReader().read(str(tmp_path / "nowhere.tar"), samples[0])
    intact = shard.read_bytes()
    with open(shard, "r+b") as file:
        file.truncate(samples[4].members[1].offset + 10)
    reader = ShardReader()
    assert reader.read(str(shard), samples[3], indexed).images, "intact samples of a cut tar are still read"
    with pytest.raises(BadSample, match=r"unreadable_shard: .* is not what was indexed: .* tools.shard index"):
        reader.read(str(shard), samples[4], indexed)
    shard.write_bytes(bytes(512) + intact)
    with pytest.raises(BadSample, match=r"unreadable_shard: .* is not what was indexed"):
        reader.read(str(shard), samples[2], indexed)
    shard.write_bytes(intact)
    assert reader.read(str(shard), samples[4], indexed).images, "a shard that was restored is read again"


def test_tar_that_is_replaced_while_it_is_open(shard):
    """Most programs write a new file: the reader continues with its open one. A change in place is detected."""
    samples = scan_shard(shard).samples
    reader = ShardReader()
    reader.read(str(shard), samples[0])
    new = shard.with_suffix(".new")
    new.write_bytes(bytes(1024))
    shard.rename(shard.with_suffix(".old"))
    new.rename(shard)
    assert reader.read(str(shard), samples[1]).images
    with open(shard.with_suffix(".old"), "r+b") as file:
        file.seek(samples[1].members[1].offset)
        file.write(bytes(100))
    with pytest.raises(BadSample, match="checksum"):
        reader.read(str(shard), samples[1])


@pytest.mark.parametrize("record", [b"{", b"[1]", b'"x"', b"\xff\xfe", b"{}", b"[" * 100_000])
def test_unreadable_record_is_rejected(tmp_path, record):
    with ShardWriter(tmp_path, "bad", max_bytes=1 << 20) as writer:
        writer.write("0", [("json", record)])
    with pytest.raises(BadSample, match="bad_record"):
        read_all(writer.path)


def test_reader_keeps_only_a_few_files_open(tmp_path):
    reader = ShardReader(keep_open=2)
    for number in range(5):
        writer = ShardWriter(tmp_path, f"s{number}", max_bytes=1)
        sample = writer.write("0", FILES)
        writer.close()
        path = writer.path
        for _ in range(2):
            assert reader.read(str(path), ShardSample(sample.key, sample.members)).record == RECORD
    assert len(open_files(tmp_path)) == 2
    reader.close()
    assert not open_files(tmp_path)
