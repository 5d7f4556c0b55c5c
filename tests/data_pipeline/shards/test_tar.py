"""The tar format against tarfile and GNU tar; damaged and hostile tars: no sample is lost without a reason."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from data_pipeline.errors import BadSample, DataError
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.scan import scan_shard
from data_pipeline.shards.tar import MAX_SIZE, header
from data_pipeline.shards.writer import ShardWriter
from tests.data_pipeline.media_files import encoded, pattern

IMAGE = encoded(pattern(40, 50), "JPEG")
RECORD = json.dumps({"domain": "image_text", "text": "A cat."}).encode()
LONG = "folder-" + "f" * 90 + "/" + "k" * 80  # needs the prefix field of USTAR


def tar_of(path: Path, entries: list[tuple[tarfile.TarInfo | str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for info, data in entries:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def special(name: str, kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info, b""


def scanned(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    scan = scan_shard(path)
    return [sample.key for sample in scan.samples], [(key, error.reason) for key, error in scan.rejected]


GOOD: list[tuple[tarfile.TarInfo | str, bytes]] = [("good.json", RECORD), ("good.0.jpg", IMAGE)]


@pytest.mark.fast
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 9 * 512, 10240 - 1536])
def test_written_tars_equal_tarfile_byte_for_byte(tmp_path, size):
    files = [("json", RECORD), ("0.jpg", bytes(size))]
    with ShardWriter(tmp_path, "written", 1 << 20) as writer:
        for key in ("000", LONG, "ключ/图"):
            writer.write(key, files)
    expected = tar_of(tmp_path / "t", [(f"{k}.{e}", data) for k in ("000", LONG, "ключ/图") for e, data in files])
    assert writer.path.read_bytes() == expected.read_bytes()


@pytest.mark.fast
def test_written_tars_are_readable_by_gnu_tar_and_webdataset(tmp_path):
    with ShardWriter(tmp_path, "written", 1 << 20) as writer:
        for key in ("000", LONG):
            writer.write(key, [("json", RECORD), ("0.jpg", IMAGE)])
    listed = subprocess.run(["tar", "-tf", writer.path], capture_output=True, text=True, check=True).stdout.split()
    assert listed == [f"{key}.{extension}" for key in ("000", LONG) for extension in ("json", "0.jpg")]
    samples = list(wds.WebDataset(str(writer.path), shardshuffle=False))
    assert [(sample["__key__"], sample["0.jpg"]) for sample in samples] == [("000", IMAGE), (LONG, IMAGE)]


@pytest.mark.fast
def test_samples_returned_by_the_writer_equal_those_of_a_scan(tmp_path):
    with ShardWriter(tmp_path, "written", 1 << 20) as writer:
        written = [writer.write(key, [("json", RECORD), ("0.jpg", IMAGE)]) for key in ("000", LONG)]
    assert scan_shard(writer.path).samples == written


@pytest.mark.fast
@pytest.mark.parametrize("key", ["", "a.b", "/a", "a/../b", "../a", "a/", "a\0b"])
def test_key_that_would_be_read_as_another_is_an_error(tmp_path, key):
    with pytest.raises(DataError, match="cannot be a key"):
        ShardWriter(tmp_path, "written", 1).write(key, [("json", RECORD)])
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
def test_header_of_what_a_tar_cannot_hold_is_an_error():
    with pytest.raises(DataError, match="too long for a tar"):
        header("k" * 101, 1)
    with pytest.raises(DataError, match="smaller than 8 GiB"):
        header("0.mp4", MAX_SIZE + 1)
    assert tarfile.TarInfo.frombuf(header("0.mp4", MAX_SIZE), "utf-8", "strict").size == MAX_SIZE


@pytest.mark.fast
def test_error_leaves_no_unfinished_shard(tmp_path):
    def fail() -> None:
        with ShardWriter(tmp_path, "written", 1 << 20) as writer:
            writer.write("0", [("json", RECORD)])
            assert list(tmp_path.iterdir())
            writer.write("a.b", [("json", RECORD)])

    with pytest.raises(DataError, match="cannot be a key"):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_scan_reads_every_format_and_names_of_every_length(tmp_path, format):
    keys = [f"{'d' * 40}/{'d' * 40}/{'k' * length}" for length in range(1, 60, 7)] + ["图"]
    if format != tarfile.USTAR_FORMAT:
        keys += ["k" * 300, f"{'d/' * 90}0"]  # the second is cut off after a slash, like a folder's name
    infos: list[tuple[tarfile.TarInfo | str, bytes]] = []
    for key in keys:
        info = tarfile.TarInfo(f"{key}.json")
        info.mtime = 1.5  # needs a PAX record
        infos += [(info, RECORD), (f"{key}.0.jpg", IMAGE)]
    assert scanned(tar_of(tmp_path / "foreign.tar", infos, format)) == (keys, [])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("entries", "rejected"),
    [
        ([("../evil.0.jpg", IMAGE)], [("../evil", "path_traversal")]),
        ([("/etc/evil.0.jpg", IMAGE)], [("/etc/evil", "path_traversal")]),
        ([("a/../../evil.json", RECORD)], [("a/../../evil", "path_traversal")]),
        ([special("link.0.jpg", tarfile.SYMTYPE)], [("link", "not_a_file")]),
        ([special("hard.json", tarfile.LNKTYPE), ("hard.0.jpg", IMAGE)], [("hard", "not_a_file")]),
        ([special("null", tarfile.CHRTYPE), special("pipe", tarfile.FIFOTYPE)], [("", "not_a_file")] * 2),
        ([special("folder/", tarfile.DIRTYPE)], []),
        ([("x.0.jpg", IMAGE), ("x.2.jpg", IMAGE), ("x.json", RECORD)], [("x", "missing_member")]),
        ([("x.1.mp4", IMAGE), ("x.json", RECORD)], [("x", "missing_member")]),
        ([("x.json", RECORD), ("y.json", RECORD), ("x.json", RECORD), ("y.jpg", IMAGE)], [("x", "duplicate_key")]),
        ([("x.json", RECORD), ("x.jpg", IMAGE), ("x.0.png", IMAGE)], [("x", "duplicate_key")]),
        ([("x.json", RECORD), ("x.0.jpg", IMAGE), ("x.seg.png", b"?"), ("x.npy", b"?"), (".DS_Store", b"?")], []),
    ],
)
def test_bad_members_are_rejected_with_a_reason(tmp_path, entries, rejected):
    """Each lies between two good samples, which are kept."""
    last: list[tuple[tarfile.TarInfo | str, bytes]] = [("last.json", RECORD), ("last.0.jpg", IMAGE)]
    keys, found = scanned(tar_of(tmp_path / "bad.tar", GOOD + entries + last))
    assert found == rejected
    assert {"good", "last"} <= set(keys)
    assert not {key for key, _ in rejected} & set(keys)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar"], "nothing is unpacked"


@pytest.mark.fast
def test_sparse_files_are_rejected(tmp_path):
    hole = tmp_path / "hole.0.jpg"
    with open(hole, "wb") as file:
        file.seek(1 << 20)
        file.write(IMAGE)
    for name, data in GOOD:
        (tmp_path / str(name)).write_bytes(data)
    for format in ("gnu", "posix"):
        path = tmp_path / f"{format}.tar"
        names = ["hole.0.jpg", *(str(name) for name, _ in GOOD)]
        subprocess.run(["tar", "-S", f"--format={format}", "-cf", path, "-C", tmp_path, *names], check=True)
        keys, rejected = scanned(path)
        assert keys == ["good"]
        assert [reason for _, reason in rejected] == ["not_a_file"]


@pytest.mark.fast
def test_header_with_a_false_size_is_rejected(tmp_path):
    """A terabyte in a small file: it counts as cut, and the samples before it are kept."""
    path = tar_of(tmp_path / "bad.tar", GOOD)
    good = path.read_bytes()[: -(-(1024 + 512 + len(IMAGE)) // 512) * 512]
    info = tarfile.TarInfo("huge.0.jpg")
    info.size = 1 << 40
    path.write_bytes(good + info.tobuf(tarfile.GNU_FORMAT) + IMAGE)
    assert scanned(path) == (["good"], [("huge", "truncated_tar")])
    with open(path, "wb") as file:  # a terabyte that exists, as a hole in the file
        file.write(good + info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(file.tell() + (1 << 40) + 1024)
    assert scanned(path) == (["good"], [("huge", "member_too_large")])


@pytest.mark.fast
def test_extension_larger_than_any_file_is_rejected(tmp_path):
    """A long name of 2**62 and of 2**80 bytes: it counts as cut, and the samples before it are kept."""
    for size in (1 << 62, 1 << 80):
        info = tarfile.TarInfo("huge")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
        path = tmp_path / "bad.tar"
        good = tar_of(path, GOOD).read_bytes()[: -(-(1024 + 512 + len(IMAGE)) // 512) * 512]
        path.write_bytes(good + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        assert scanned(path) == (["good"], [("", "truncated_tar")])


@pytest.mark.fast
def test_large_extension_takes_little_memory(tmp_path):
    """A PAX header of 100 MB hides the name of its member, which is rejected. Little of it is read."""
    bomb = tarfile.TarInfo("bomb")
    bomb.type, bomb.size = tarfile.XHDTYPE, 100 << 20
    path = tmp_path / "bomb.tar"
    with open(path, "wb") as file:
        file.write(bomb.tobuf(tarfile.USTAR_FORMAT))
        file.seek(bomb.size, 1)
        file.write(tar_of(tmp_path / "rest.tar", [("x.json", RECORD), *GOOD]).read_bytes())
    tracemalloc.start()
    keys, rejected = scanned(path)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
    assert (keys, rejected) == (["good"], [("", "damaged_tar")])


@pytest.mark.fast
def test_samples_after_a_damaged_header_are_read(tmp_path):
    with ShardWriter(tmp_path, "written", 1 << 20) as writer:
        written = [writer.write(str(n), [("json", RECORD), ("0.jpg", IMAGE)]) for n in range(5)]
    for damage in (b"\xff" * 512, bytes(512), b"x"):
        path = Path(shutil.copy(writer.path, tmp_path / "bad.tar"))
        with open(path, "r+b") as file:
            file.seek(written[2].members[0].offset - 512)
            file.write(damage)
        scan = scan_shard(path)
        assert [error.reason for _, error in scan.rejected] == ["damaged_tar"]
        assert scan.samples[:2] + scan.samples[-2:] == written[:2] + written[3:]


@pytest.mark.fast
def test_concatenated_tars_are_read_as_one(tmp_path):
    parts = [tar_of(tmp_path / f"{n}.tar", [(f"{n}.json", RECORD), (f"{n}.jpg", IMAGE)]) for n in range(3)]
    both = tmp_path / "all.tar"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert scanned(both) == (["0", "1", "2"], [])


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip a few bits, overwrite, remove or repeat blocks, change sizes, or cut off the end."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        block = 512 * int(rng.integers(len(changed) // 512))
        position = block + int(rng.integers(512))
        match rng.integers(8):
            case 0:
                changed[position] ^= 1 << int(rng.integers(8))
            case 1:
                changed[block : block + 512] = rng.bytes(512)
            case 2:
                changed[block : block + 512] = bytes(512)
            case 3:
                del changed[block : block + 512]
            case 4:
                changed[block:block] = changed[block : block + 1024]
            case 5:
                del changed[max(position, 1024) :]
            case 6:
                del changed[position : position + 3]
            case 7:
                changed[block + 124 : block + 136] = b"%011o\0" % int(rng.integers(1 << 33))
    return bytes(changed)


def scan_damaged_tars(folder: Path, cases: int, seed: int) -> Counter[str]:
    """Damage small shards of every format and count the outcomes. No sample is lost without a reason."""
    rng = np.random.default_rng(seed)
    entries: list[tuple[tarfile.TarInfo | str, bytes]] = [
        (f"{n}.{extension}", data) for n in range(4) for extension, data in (("json", RECORD), ("0.jpg", IMAGE))
    ]
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    intact = [tar_of(folder / f"{format}.tar", entries, format).read_bytes() for format in formats]
    path = folder / "damaged.tar"
    outcomes: Counter[str] = Counter()
    for case in range(cases):
        path.write_bytes(damaged(intact[case % 3], rng))
        try:
            scan = scan_shard(path)
        except DataError:
            outcomes["not a tar"] += 1
            continue
        reasons = [error.reason for _, error in scan.rejected]
        outcomes.update(reasons)
        reader = ShardReader()
        for sample in scan.samples:
            assert len(reader.read_members(str(path), sample)) == len(sample.members)
            try:
                reader.read(str(path), sample)
                outcomes["read"] += 1
            except BadSample as error:
                outcomes[error.reason] += 1
        reader.close()
        lost = {str(n) for n in range(4)} - {sample.key for sample in scan.samples}
        assert not lost or reasons, f"case {case}: {lost} are lost without a reason"
    assert {other.name for other in folder.iterdir()} == {*(f"{format}.tar" for format in formats), path.name}
    return outcomes


def test_a_few_damaged_tars(tmp_path):
    outcomes = scan_damaged_tars(tmp_path, cases=600, seed=3)
    assert {"read", "truncated_tar", "damaged_tar"} <= set(outcomes)


@pytest.mark.slow
def test_many_damaged_tars(tmp_path):
    scan_damaged_tars(tmp_path, cases=10_000, seed=4)
