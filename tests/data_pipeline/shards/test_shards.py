"""Tar files: ours in webdataset, everyone's in ours, and what is wrong with a damaged one."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
import xxhash

from data_pipeline.errors import BadSample, DataError
from data_pipeline.shards.members import ShardSample
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.scan import Scan, scan_shard
from data_pipeline.shards.tar import fingerprint
from data_pipeline.shards.writer import ShardWriter
from tests.data_pipeline.media_files import encoded, pattern

pytestmark = pytest.mark.fast

PICTURE, SECOND = encoded(pattern(40, 50), "JPEG"), encoded(pattern(50, 40, 1), "PNG")
RECORD = {"domain": "interleaved", "text": "<image> ü <image>"}
FILES = [("json", json.dumps(RECORD).encode()), ("0.jpg", PICTURE), ("1.png", SECOND)]
FILES_BY_NAME = dict(FILES)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    writer = ShardWriter(tmp_path, "ours", max_bytes=1 << 20)
    for number in range(5):
        writer.write(f"{number:09d}", FILES)
    writer.close()
    assert [path.name for path in writer.finished] == ["ours-00000.tar"]
    return writer.finished[0]


def read_all(shard: Path) -> list[tuple[str, dict, list[bytes], list[bytes]]]:
    reader = ShardReader()
    scan = scan_shard(shard)
    assert not scan.rejected
    samples = [(sample.key, reader.read(str(shard), sample)) for sample in scan.samples]
    return [(key, raw.record, raw.images, raw.videos) for key, raw in samples]


def test_our_shards_read_in_webdataset(shard):
    samples = list(wds.WebDataset(str(shard), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(5)]
    assert {name: samples[3][name] for name in FILES_BY_NAME} == FILES_BY_NAME


def test_random_reads_return_what_was_written(shard):
    assert read_all(shard) == [(f"{number:09d}", RECORD, [PICTURE, SECOND], []) for number in range(5)]


def test_shards_are_the_same_bytes_each_time(shard, tmp_path):
    other = ShardWriter(tmp_path, "again", max_bytes=1 << 20)
    for number in range(5):
        other.write(f"{number:09d}", FILES)
    other.close()
    assert other.finished[0].read_bytes() == shard.read_bytes()


def test_a_new_shard_begins_when_one_is_full(tmp_path):
    writer = ShardWriter(tmp_path, "many", max_bytes=20_000)
    for number in range(12):
        writer.write(f"{number:09d}", FILES)
    writer.close()
    assert len(writer.finished) > 2
    assert [key for path in writer.finished for key, *_ in read_all(path)] == [f"{n:09d}" for n in range(12)]
    assert not list(tmp_path.glob("*.tmp"))


def test_webdatasets_writer(tmp_path):
    path = tmp_path / "theirs.tar"
    with wds.TarWriter(str(path)) as writer:
        for number in range(3):
            writer.write({"__key__": f"some/where/{number}", "json": RECORD, "0.jpg": PICTURE, "1.png": SECOND})
    assert read_all(path) == [(f"some/where/{number}", RECORD, [PICTURE, SECOND], []) for number in range(3)]


def test_gnu_tar(tmp_path):
    """GNU tar's own headers, a long name, a directory, a hidden file, a file of another kind; KEY.10 after KEY.2."""
    folder = tmp_path / "files"
    (folder / "sub").mkdir(parents=True)
    long = "k" * 120
    for number in range(12):
        (folder / "sub" / f"{long}.{number}.jpg").write_bytes(PICTURE + bytes(number))
    (folder / "sub" / f"{long}.json").write_bytes(FILES_BY_NAME["json"])
    (folder / "sub" / f"{long}.npy").write_bytes(b"x")
    (folder / "sub" / ".DS_Store").write_bytes(b"x")
    path = tmp_path / "gnu.tar"
    subprocess.run(["tar", "--format=gnu", "-cf", path, "-C", folder, "."], check=True)
    [(key, record, images, videos)] = read_all(path)
    assert (key, record, videos) == (f"sub/{long}", RECORD, [])
    assert images == [PICTURE + bytes(number) for number in range(12)]


def test_members_of_a_sample_need_not_be_neighbours(tmp_path):
    """As `tar` packs a folder in whatever order the file system lists it."""
    path = tmp_path / "mixed.tar"
    for number in range(3):
        for extension, data in FILES:
            (tmp_path / f"{number}.{extension}").write_bytes(data)
    names = [f"{number}.{extension}" for extension, _ in reversed(FILES) for number in range(3)]
    subprocess.run(["tar", "-cf", path, "-C", tmp_path, *names], check=True)
    assert read_all(path) == [(str(number), RECORD, [PICTURE, SECOND], []) for number in range(3)]


def test_img2dataset_layout(tmp_path):
    path = tmp_path / "theirs.tar"
    with wds.TarWriter(str(path)) as writer:
        writer.write({"__key__": "0", "jpg": PICTURE, "txt": "A cat. \n", "json": {"url": "x", "width": 5}})
        writer.write({"__key__": "1", "jpg": PICTURE, "txt": "A dog."})
    captions = [(record, len(images)) for _, record, images, _ in read_all(path)]
    assert captions == [({"domain": "image_text", "text": text}, 1) for text in ("A cat.", "A dog.")]


def test_changed_bytes_are_noticed(shard):
    samples = scan_shard(shard).samples
    offset = samples[2].members[1].offset
    with open(shard, "r+b") as file:
        file.seek(offset + 30)
        file.write(b"\xff\x00\xff")
    reader = ShardReader()
    assert reader.read(str(shard), samples[1]).images
    with pytest.raises(BadSample, match="checksum: its image of"):
        reader.read(str(shard), samples[2])


def test_a_missing_a_shortened_and_a_replaced_shard(shard, tmp_path):
    samples = scan_shard(shard).samples
    indexed = fingerprint(shard)
    with pytest.raises(BadSample, match=r"unreadable_shard: .*nowhere\.tar cannot be opened .*: restore it"):
        ShardReader().read(str(tmp_path / "nowhere.tar"), samples[0])
    whole = shard.read_bytes()
    with open(shard, "r+b") as file:
        file.truncate(samples[4].members[1].offset + 10)
    reader = ShardReader()
    assert reader.read(str(shard), samples[3], indexed).images, "what is left of a cut tar is as good as before"
    with pytest.raises(BadSample, match=r"unreadable_shard: .* is not what was indexed: .* tools.shard index"):
        reader.read(str(shard), samples[4], indexed)
    shard.write_bytes(bytes(512) + whole)
    with pytest.raises(BadSample, match=r"unreadable_shard: .* is not what was indexed"):
        reader.read(str(shard), samples[2], indexed)
    shard.write_bytes(whole)
    assert reader.read(str(shard), samples[4], indexed).images, "a shard that was restored is read again"


def test_a_tar_that_was_replaced_while_it_was_open(shard):
    """Most tools write a new file: the reader goes on with what it has open. Of one that is written in place it notices
    the first sample that differs."""
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


def test_a_truncated_tar_keeps_its_whole_samples(shard, tmp_path):
    """Cut inside a picture, inside a header, between two members, and before the end mark."""
    samples = scan_shard(shard).samples
    second, last = samples[3].members[1], samples[4].members[2]
    end = -(-(last.offset + last.size) // 512) * 512
    for length, whole, keys in (
        (second.offset + 10, 3, ["000000003"]),
        (second.offset - 100, 4, [""]),  # of sample 3 the JSON alone is left, which measuring it will find out
        (second.offset - 512, 4, [""]),
        (end, 5, [""]),
    ):
        cut = tmp_path / f"{length}.tar"
        shutil.copy(shard, cut)
        with open(cut, "r+b") as file:
            file.truncate(length)
        scan = scan_shard(cut)
        assert [(key, error.reason) for key, error in scan.rejected] == [(key, "truncated_tar") for key in keys]
        assert scan.samples[:3] == samples[:3]
        assert len(scan.samples) == whole


def test_not_a_plain_tar(shard, tmp_path):
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(DataError, match=r"packed.tar is not a plain tar file: .* unpack it first, with gunzip"):
        scan_shard(packed)
    (tmp_path / "text.tar").write_text("hello " * 500)
    with pytest.raises(DataError, match="is not a plain tar file"):
        scan_shard(tmp_path / "text.tar")
    (tmp_path / "nothing.tar").touch()
    with pytest.raises(DataError, match=r"nothing\.tar is empty"):
        scan_shard(tmp_path / "nothing.tar")


def test_an_empty_tar(tmp_path):
    tarfile.open(tmp_path / "empty.tar", "w").close()
    assert scan_shard(tmp_path / "empty.tar") == Scan()


@pytest.mark.parametrize("record", [b"{", b"[1]", b'"x"', b"\xff\xfe", b"{}", b"[" * 100_000])
def test_records_that_cannot_be_read(tmp_path, record):
    with ShardWriter(tmp_path, "bad", max_bytes=1 << 20) as writer:
        writer.write("0", [("json", record)])
    with pytest.raises(BadSample, match="bad_record"):
        read_all(writer.path)


def test_a_few_files_stay_open(tmp_path):
    reader = ShardReader(keep_open=2)
    for number in range(5):
        writer = ShardWriter(tmp_path, f"s{number}", max_bytes=1)
        sample = writer.write("0", FILES)
        writer.close()
        path = writer.path
        for _ in range(2):
            assert reader.read(str(path), ShardSample(sample.key, sample.members)).record == RECORD
    assert len(reader._open) == 2
    reader.close()
    assert not reader._open


def test_members_carry_the_checksum_of_their_bytes(shard):
    sample = scan_shard(shard).samples[0]
    assert [member.xxh3 for member in sample.members] == [xxhash.xxh3_64(data).intdigest() for _, data in FILES]
