"""The tar format against tarfile and GNU tar; tars that mean harm or were harmed: nothing is lost without a count."""

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

PICTURE = encoded(pattern(40, 50), "JPEG")
RECORD = json.dumps({"domain": "image_text", "text": "A cat."}).encode()
LONG = "folder-" + "f" * 90 + "/" + "k" * 80  # needs USTAR's second field


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


def outcome(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    scan = scan_shard(path)
    return [sample.key for sample in scan.samples], [(key, error.reason) for key, error in scan.rejected]


GOOD: list[tuple[tarfile.TarInfo | str, bytes]] = [("good.json", RECORD), ("good.0.jpg", PICTURE)]


@pytest.mark.fast
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 9 * 512, 10240 - 1536])
def test_our_tars_are_tarfiles_byte_for_byte(tmp_path, size):
    files = [("json", RECORD), ("0.jpg", bytes(size))]
    with ShardWriter(tmp_path, "ours", 1 << 20) as writer:
        for key in ("000", LONG, "ключ/图"):
            writer.write(key, files)
    theirs = tar_of(tmp_path / "t", [(f"{k}.{e}", data) for k in ("000", LONG, "ключ/图") for e, data in files])
    assert writer.path.read_bytes() == theirs.read_bytes()


@pytest.mark.fast
def test_our_tars_read_in_gnu_tar_and_webdataset(tmp_path):
    with ShardWriter(tmp_path, "ours", 1 << 20) as writer:
        for key in ("000", LONG):
            writer.write(key, [("json", RECORD), ("0.jpg", PICTURE)])
    listed = subprocess.run(["tar", "-tf", writer.path], capture_output=True, text=True, check=True).stdout.split()
    assert listed == [f"{key}.{extension}" for key in ("000", LONG) for extension in ("json", "0.jpg")]
    samples = list(wds.WebDataset(str(writer.path), shardshuffle=False))
    assert [(sample["__key__"], sample["0.jpg"]) for sample in samples] == [("000", PICTURE), (LONG, PICTURE)]


@pytest.mark.fast
def test_what_the_writer_returns_is_what_a_scan_finds(tmp_path):
    with ShardWriter(tmp_path, "ours", 1 << 20) as writer:
        written = [writer.write(key, [("json", RECORD), ("0.jpg", PICTURE)]) for key in ("000", LONG)]
    assert scan_shard(writer.path).samples == written


@pytest.mark.fast
@pytest.mark.parametrize("key", ["", "a.b", "/a", "a/../b", "../a", "a/", "a\0b"])
def test_keys_that_would_be_read_as_others_are_refused(tmp_path, key):
    with pytest.raises(DataError, match="cannot be a key"):
        ShardWriter(tmp_path, "ours", 1).write(key, [("json", RECORD)])
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
def test_what_a_tar_cannot_hold_is_refused():
    with pytest.raises(DataError, match="too long for a tar"):
        header("k" * 101, 1)
    with pytest.raises(DataError, match="smaller than 8 GiB"):
        header("0.mp4", MAX_SIZE + 1)
    assert tarfile.TarInfo.frombuf(header("0.mp4", MAX_SIZE), "utf-8", "strict").size == MAX_SIZE


@pytest.mark.fast
def test_an_error_leaves_no_shard_behind(tmp_path):
    def fail() -> None:
        with ShardWriter(tmp_path, "ours", 1 << 20) as writer:
            writer.write("0", [("json", RECORD)])
            assert list(tmp_path.iterdir())
            writer.write("a.b", [("json", RECORD)])

    with pytest.raises(DataError, match="cannot be a key"):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_and_names_of_every_length(tmp_path, format):
    keys = [f"{'d' * 40}/{'d' * 40}/{'k' * length}" for length in range(1, 60, 7)] + ["图"]
    if format != tarfile.USTAR_FORMAT:
        keys += ["k" * 300, f"{'d/' * 90}0"]  # the second is cut off behind a slash, as a folder's name ends
    infos: list[tuple[tarfile.TarInfo | str, bytes]] = []
    for key in keys:
        info = tarfile.TarInfo(f"{key}.json")
        info.mtime = 1.5  # a PAX record of its own
        infos += [(info, RECORD), (f"{key}.0.jpg", PICTURE)]
    assert outcome(tar_of(tmp_path / "their.tar", infos, format)) == (keys, [])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("entries", "rejected"),
    [
        ([("../evil.0.jpg", PICTURE)], [("../evil", "path_traversal")]),
        ([("/etc/evil.0.jpg", PICTURE)], [("/etc/evil", "path_traversal")]),
        ([("a/../../evil.json", RECORD)], [("a/../../evil", "path_traversal")]),
        ([special("link.0.jpg", tarfile.SYMTYPE)], [("link", "not_a_file")]),
        ([special("hard.json", tarfile.LNKTYPE), ("hard.0.jpg", PICTURE)], [("hard", "not_a_file")]),
        ([special("null", tarfile.CHRTYPE), special("pipe", tarfile.FIFOTYPE)], [("", "not_a_file")] * 2),
        ([special("folder/", tarfile.DIRTYPE)], []),
        ([("x.0.jpg", PICTURE), ("x.2.jpg", PICTURE), ("x.json", RECORD)], [("x", "missing_member")]),
        ([("x.1.mp4", PICTURE), ("x.json", RECORD)], [("x", "missing_member")]),
        ([("x.json", RECORD), ("y.json", RECORD), ("x.json", RECORD), ("y.jpg", PICTURE)], [("x", "duplicate_key")]),
        ([("x.json", RECORD), ("x.jpg", PICTURE), ("x.0.png", PICTURE)], [("x", "duplicate_key")]),
        ([("x.json", RECORD), ("x.0.jpg", PICTURE), ("x.seg.png", b"?"), ("x.npy", b"?"), (".DS_Store", b"?")], []),
    ],
)
def test_members_that_are_set_aside(tmp_path, entries, rejected):
    """Each between two good samples, of which nothing is lost."""
    last: list[tuple[tarfile.TarInfo | str, bytes]] = [("last.json", RECORD), ("last.0.jpg", PICTURE)]
    keys, met = outcome(tar_of(tmp_path / "bad.tar", GOOD + entries + last))
    assert met == rejected
    assert {"good", "last"} <= set(keys)
    assert not {key for key, _ in rejected} & set(keys)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar"], "nothing is unpacked"


@pytest.mark.fast
def test_sparse_files(tmp_path):
    hole = tmp_path / "hole.0.jpg"
    with open(hole, "wb") as file:
        file.seek(1 << 20)
        file.write(PICTURE)
    for name, data in GOOD:
        (tmp_path / str(name)).write_bytes(data)
    for format in ("gnu", "posix"):
        path = tmp_path / f"{format}.tar"
        names = ["hole.0.jpg", *(str(name) for name, _ in GOOD)]
        subprocess.run(["tar", "-S", f"--format={format}", "-cf", path, "-C", tmp_path, *names], check=True)
        keys, rejected = outcome(path)
        assert keys == ["good"]
        assert [reason for _, reason in rejected] == ["not_a_file"]


@pytest.mark.fast
def test_a_size_that_lies(tmp_path):
    """A terabyte in a small file: said to be cut, and what came before it is kept."""
    path = tar_of(tmp_path / "bad.tar", GOOD)
    whole = path.read_bytes()[: -(-(1024 + 512 + len(PICTURE)) // 512) * 512]
    info = tarfile.TarInfo("huge.0.jpg")
    info.size = 1 << 40
    path.write_bytes(whole + info.tobuf(tarfile.GNU_FORMAT) + PICTURE)
    assert outcome(path) == (["good"], [("huge", "truncated_tar")])
    with open(path, "wb") as file:  # and one that is there, as a hole in the file
        file.write(whole + info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(file.tell() + (1 << 40) + 1024)
    assert outcome(path) == (["good"], [("huge", "member_too_large")])


@pytest.mark.fast
def test_an_extension_larger_than_any_file(tmp_path):
    """A long name of 2**62 and of 2**80 bytes: said to be cut, and what came before it is kept."""
    for size in (1 << 62, 1 << 80):
        info = tarfile.TarInfo("huge")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
        path = tmp_path / "bad.tar"
        whole = tar_of(path, GOOD).read_bytes()[: -(-(1024 + 512 + len(PICTURE)) // 512) * 512]
        path.write_bytes(whole + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        assert outcome(path) == (["good"], [("", "truncated_tar")])


@pytest.mark.fast
def test_extensions_of_any_size_take_little_memory(tmp_path):
    """A PAX header of 100 MB before a member: its name is not known, so it is set aside, and little of it is read."""
    bomb = tarfile.TarInfo("bomb")
    bomb.type, bomb.size = tarfile.XHDTYPE, 100 << 20
    path = tmp_path / "bomb.tar"
    with open(path, "wb") as file:
        file.write(bomb.tobuf(tarfile.USTAR_FORMAT))
        file.seek(bomb.size, 1)
        file.write(tar_of(tmp_path / "rest.tar", [("x.json", RECORD), *GOOD]).read_bytes())
    tracemalloc.start()
    keys, rejected = outcome(path)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
    assert (keys, rejected) == (["good"], [("", "damaged_tar")])


@pytest.mark.fast
def test_after_a_damaged_header_the_rest_is_read(tmp_path):
    with ShardWriter(tmp_path, "ours", 1 << 20) as writer:
        written = [writer.write(str(n), [("json", RECORD), ("0.jpg", PICTURE)]) for n in range(5)]
    for damage in (b"\xff" * 512, bytes(512), b"x"):
        path = Path(shutil.copy(writer.path, tmp_path / "bad.tar"))
        with open(path, "r+b") as file:
            file.seek(written[2].members[0].offset - 512)
            file.write(damage)
        scan = scan_shard(path)
        assert [error.reason for _, error in scan.rejected] == ["damaged_tar"]
        assert scan.samples[:2] + scan.samples[-2:] == written[:2] + written[3:]


@pytest.mark.fast
def test_tars_put_one_after_the_other(tmp_path):
    parts = [tar_of(tmp_path / f"{n}.tar", [(f"{n}.json", RECORD), (f"{n}.jpg", PICTURE)]) for n in range(3)]
    both = tmp_path / "all.tar"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert outcome(both) == (["0", "1", "2"], [])


def harmed(data: bytes, rng: np.random.Generator) -> bytes:
    """A few bits flipped, blocks overwritten, removed or doubled, sizes changed, or the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        block = 512 * int(rng.integers(len(changed) // 512))
        place = block + int(rng.integers(512))
        match rng.integers(8):
            case 0:
                changed[place] ^= 1 << int(rng.integers(8))
            case 1:
                changed[block : block + 512] = rng.bytes(512)
            case 2:
                changed[block : block + 512] = bytes(512)
            case 3:
                del changed[block : block + 512]
            case 4:
                changed[block:block] = changed[block : block + 1024]
            case 5:
                del changed[max(place, 1024) :]
            case 6:
                del changed[place : place + 3]
            case 7:
                changed[block + 124 : block + 136] = b"%011o\0" % int(rng.integers(1 << 33))
    return bytes(changed)


def survive(folder: Path, cases: int, seed: int) -> Counter[str]:
    """Harms small shards of every format. Every sample is there, was set aside by key, or fell to a counted damage."""
    rng = np.random.default_rng(seed)
    entries: list[tuple[tarfile.TarInfo | str, bytes]] = [
        (f"{n}.{extension}", data) for n in range(4) for extension, data in (("json", RECORD), ("0.jpg", PICTURE))
    ]
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    whole = [tar_of(folder / f"{format}.tar", entries, format).read_bytes() for format in formats]
    path = folder / "harmed.tar"
    met: Counter[str] = Counter()
    for case in range(cases):
        path.write_bytes(harmed(whole[case % 3], rng))
        try:
            scan = scan_shard(path)
        except DataError:
            met["not a tar"] += 1
            continue
        reasons = [error.reason for _, error in scan.rejected]
        met.update(reasons)
        reader = ShardReader()
        for sample in scan.samples:
            assert len(reader.read_members(str(path), sample)) == len(sample.members)
            try:
                reader.read(str(path), sample)
                met["read"] += 1
            except BadSample as error:
                met[error.reason] += 1
        reader.close()
        lost = {str(n) for n in range(4)} - {sample.key for sample in scan.samples}
        assert not lost or reasons, f"case {case}: {lost} are gone without a word"
    assert {other.name for other in folder.iterdir()} == {*(f"{format}.tar" for format in formats), path.name}
    return met


def test_a_few_harmed_tars(tmp_path):
    met = survive(tmp_path, cases=600, seed=3)
    assert {"read", "truncated_tar", "damaged_tar"} <= set(met)


@pytest.mark.slow
def test_many_harmed_tars(tmp_path):
    survive(tmp_path, cases=10_000, seed=4)
