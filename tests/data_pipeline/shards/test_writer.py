"""Shards as they are written: readable by webdataset, reproducible, with correct checksums."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import webdataset as wds
import xxhash

from data_pipeline.errors import DataError
from data_pipeline.shards import writer as writer_module
from data_pipeline.shards.index import write_index
from data_pipeline.shards.scan import scan_shard
from data_pipeline.shards.writer import ShardWriter
from tests.data_pipeline.shards.shard_files import FILES, FILES_BY_NAME, IMAGE, RECORD, SECOND, read_all

pytestmark = pytest.mark.fast


def test_shards_are_readable_by_webdataset(shard):
    samples = list(wds.WebDataset(str(shard), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(5)]
    assert {name: samples[3][name] for name in FILES_BY_NAME} == FILES_BY_NAME


def test_reader_returns_what_was_written(shard):
    assert read_all(shard) == [(f"{number:09d}", RECORD, [IMAGE, SECOND], []) for number in range(5)]


def test_same_samples_give_the_same_bytes(shard, tmp_path):
    other = ShardWriter(tmp_path, "again", max_bytes=1 << 20)
    for number in range(5):
        other.write(f"{number:09d}", FILES)
    other.close()
    assert other.finished[0].read_bytes() == shard.read_bytes()


def test_writer_begins_a_new_shard_when_one_is_full(tmp_path):
    writer = ShardWriter(tmp_path, "many", max_bytes=20_000)
    for number in range(12):
        writer.write(f"{number:09d}", FILES)
    writer.close()
    assert len(writer.finished) > 2
    assert [key for path in writer.finished for key, *_ in read_all(path)] == [f"{n:09d}" for n in range(12)]
    assert not list(tmp_path.glob("*.tmp"))


def test_sample_that_is_too_large_leaves_the_shard_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setitem(writer_module.MAX_BYTES, "video", 10)
    with ShardWriter(tmp_path, "some", max_bytes=1 << 20) as writer:
        with pytest.raises(DataError, match=r"0\.0\.mp4 has 11 bytes, 10 are allowed"):
            writer.write("0", [*FILES, ("0.mp4", bytes(11))])
        indexed = writer.write("1", FILES)
    assert scan_shard(writer.finished[0]).samples == [indexed]


def test_members_have_the_checksum_of_their_bytes(shard):
    sample = scan_shard(shard).samples[0]
    assert [member.xxh3 for member in sample.members] == [xxhash.xxh3_64(data).intdigest() for _, data in FILES]


def test_shards_and_indexes_are_on_disk_before_they_are_renamed(tmp_path, monkeypatch):
    """After a power cut a file is complete or absent: flush the content, rename, flush the folder."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def recording_replace(source: Path, target: Path) -> None:
        events.append(("replace", f"{Path(source).name} {Path(target).name}"))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    with ShardWriter(tmp_path, "s", max_bytes=1 << 20) as writer:
        writer.write("0", FILES)
    write_index(writer.path, [], tokenizer_hash="", chat_form="glm45v")
    temporary = events[3][1]
    assert events == [
        ("fsync", "s-00000.tar.tmp"),
        ("replace", "s-00000.tar.tmp s-00000.tar"),
        ("fsync", tmp_path.name),
        ("fsync", temporary),
        ("replace", f"{temporary} s-00000.index.arrow"),
        ("fsync", tmp_path.name),
    ]


def test_full_disk_leaves_no_unfinished_shard(tmp_path):
    """The end mark of the last shard does not fit: a limit of the size of files stops it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ShardWriter(tmp_path, "s", max_bytes=1 << 20) as whole:
        whole.write("0", FILES)
    size = whole.path.stat().st_size
    whole.path.unlink()

    def write() -> None:
        with ShardWriter(tmp_path, "s", max_bytes=1 << 20) as writer:
            writer.write("0", FILES)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 512, limits[1]))

    try:
        with pytest.raises(OSError, match="File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
