"""Tars of other programs grouped into samples; damaged tars."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import tarfile

import pytest
import webdataset as wds

from data_pipeline.errors import DataError
from data_pipeline.shards.scan import Scan, scan_shard
from tests.data_pipeline.shards.shard_files import FILES, FILES_BY_NAME, IMAGE, RECORD, SECOND, read_all

pytestmark = pytest.mark.fast


def test_tar_of_webdatasets_writer(tmp_path):
    path = tmp_path / "foreign.tar"
    with wds.TarWriter(str(path)) as writer:
        for number in range(3):
            writer.write({"__key__": f"some/where/{number}", "json": RECORD, "0.jpg": IMAGE, "1.png": SECOND})
    assert read_all(path) == [(f"some/where/{number}", RECORD, [IMAGE, SECOND], []) for number in range(3)]


def test_tar_of_gnu_tar(tmp_path):
    """GNU headers, a long name, a folder, a hidden file, a file of another kind; KEY.10 comes after KEY.2."""
    folder = tmp_path / "files"
    (folder / "sub").mkdir(parents=True)
    long = "k" * 120
    for number in range(12):
        (folder / "sub" / f"{long}.{number}.jpg").write_bytes(IMAGE + bytes(number))
    (folder / "sub" / f"{long}.json").write_bytes(FILES_BY_NAME["json"])
    (folder / "sub" / f"{long}.npy").write_bytes(b"x")
    (folder / "sub" / ".DS_Store").write_bytes(b"x")
    path = tmp_path / "gnu.tar"
    subprocess.run(["tar", "--format=gnu", "-cf", path, "-C", folder, "."], check=True)
    [(key, record, images, videos)] = read_all(path)
    assert (key, record, videos) == (f"sub/{long}", RECORD, [])
    assert images == [IMAGE + bytes(number) for number in range(12)]


def test_members_of_a_sample_need_not_be_neighbours(tmp_path):
    """`tar` packs a folder in the order in which the file system lists it."""
    path = tmp_path / "mixed.tar"
    for number in range(3):
        for extension, data in FILES:
            (tmp_path / f"{number}.{extension}").write_bytes(data)
    names = [f"{number}.{extension}" for extension, _ in reversed(FILES) for number in range(3)]
    subprocess.run(["tar", "-cf", path, "-C", tmp_path, *names], check=True)
    assert read_all(path) == [(str(number), RECORD, [IMAGE, SECOND], []) for number in range(3)]


def test_tar_in_img2dataset_layout(tmp_path):
    path = tmp_path / "foreign.tar"
    with wds.TarWriter(str(path)) as writer:
        writer.write({"__key__": "0", "jpg": IMAGE, "txt": "A cat. \n", "json": {"url": "x", "width": 5}})
        writer.write({"__key__": "1", "jpg": IMAGE, "txt": "A dog."})
    captions = [(record, len(images)) for _, record, images, _ in read_all(path)]
    assert captions == [({"domain": "image_text", "text": text}, 1) for text in ("A cat.", "A dog.")]


def test_truncated_tar_keeps_its_complete_samples(shard, tmp_path):
    """Cut inside an image, inside a header, between two members, and before the end mark."""
    samples = scan_shard(shard).samples
    second, last = samples[3].members[1], samples[4].members[2]
    end = -(-(last.offset + last.size) // 512) * 512
    for length, complete, keys in (
        (second.offset + 10, 3, ["000000003"]),
        (second.offset - 100, 4, [""]),  # only the JSON of sample 3 is left, which `measure` detects
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
        assert len(scan.samples) == complete


def test_file_that_is_not_a_plain_tar_is_an_error(shard, tmp_path):
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


def test_empty_tar_has_no_samples(tmp_path):
    tarfile.open(tmp_path / "empty.tar", "w").close()
    assert scan_shard(tmp_path / "empty.tar") == Scan()
