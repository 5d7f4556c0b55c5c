"""Members of tars whose names have dots: no sample is folded into another one, and none is lost without a word."""

from __future__ import annotations

import io
import random
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import webdataset as wds

from data_pipeline.inputs.draft import Media
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.shards.index import read_index
from data_pipeline.shards.scan import Scan, count_members, scan_shard
from tests.data_pipeline.inputs.reading import JPEG, PNG, opened, read

pytestmark = pytest.mark.fast


def write(path: Path, files: dict[str, bytes], links: tuple[str, ...] = ()) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "elsewhere"
            tar.addfile(info)
    return path


def pairs(*names: str) -> dict[str, bytes]:
    """Return an image and a caption, which is its name, of each name."""
    return {file: data for name in names for file, data in ((f"{name}.jpg", JPEG), (f"{name}.txt", name.encode()))}


def keys(path: Path) -> dict[str, list[str]]:
    """Return the kinds of the members of each sample, after checking that every member has a fate."""
    scan = scan_shard(path)
    check_accounts(path, scan)
    return {sample.key: [member.kind for member in sample.members] for sample in scan.samples}


def check_accounts(path: Path, scan: Scan) -> None:
    used = sum(len(sample.members) for sample in scan.samples)
    assert used + scan.rejected_members.total() + scan.not_read.total() == count_members(path)
    assert set(scan.rejected_members) <= {key for key, _ in scan.rejected}


NAMES_WITH_DOTS = ("235342 Track 2.0 (Clean Version)", "img_22.05", "img_22.06", "v1.2/ok")


@pytest.mark.parametrize(
    "names",
    [
        NAMES_WITH_DOTS,
        ("a", "a.0", "a.1"),
        ("a.0", "a.1"),
        ("x.00", "x.01", "x.1"),
        ("Track 2", "Track 2.0 (Clean)", "Track 2.0 (Live)"),
        ("www.example.com", "www.example.org"),
        ("a.jpg", "a.txt"),
        ("Dr. No", "Dr. Who", "Dr"),
        ("3.14", "3.141", "3"),
    ],
)
def test_names_that_differ_after_a_dot_are_samples_of_their_own(tmp_path: Path, names: tuple[str, ...]) -> None:
    path = write(tmp_path / "a.tar", pairs(*names))
    assert keys(path) == dict.fromkeys(names, keys(path)[names[0]])
    drafts, rejected = read(opened(path))
    assert rejected == []
    assert {draft.origin: draft.record["text"] for draft in drafts} == {f"a.tar/{name}": name for name in names}
    assert all(draft.images == [Media("jpg", JPEG)] for draft in drafts)
    counts = index_shards([path])
    assert counts.samples == len(names)
    assert counts.accounts.as_json()["members"]["in_samples"] == 2 * len(names)
    assert sorted(read_index(path).table.column("key").to_pylist()) == sorted(names)


@pytest.mark.parametrize(
    ("media", "text"),
    [
        ("s0.input.jpg", "s0.outputs.txt"),
        ("m3.image.jpg", "m3.txt"),
        ("m3.image.jpg", "m3.caption.txt"),
        ("m3.img.png", "m3.json"),
        ("m3.jpg", "m3.caption.txt"),
    ],
)
def test_the_only_image_and_text_of_a_key_are_a_sample(tmp_path: Path, media: str, text: str) -> None:
    caption = b'{"caption": "A cat."}' if text.endswith("json") else b"A cat."
    drafts, rejected = read(opened(write(tmp_path / "a.tar", {media: PNG, text: caption})))
    assert rejected == []
    assert [(draft.record["text"], draft.images) for draft in drafts] == [("A cat.", [Media("png", PNG)])]


def test_members_that_may_belong_together_in_two_ways_are_rejected_by_name(tmp_path: Path) -> None:
    ambiguous = {
        "1.left.jpg": JPEG,
        "1.right.jpg": JPEG,
        "1.caption.txt": b"x",
        "2.input.jpg": JPEG,
        "2.target.jpg": PNG,
    }
    path = write(tmp_path / "a.tar", {**ambiguous, "2.txt": b"Make it red.", "3.depth.png": PNG, **pairs("4")})
    drafts, rejected = read(opened(path))
    assert [draft.origin for draft in drafts] == ["a.tar/4"]
    details = {entry.origin: (entry.reason, entry.detail) for entry in rejected}
    assert {origin: reason for origin, (reason, _) in details.items()} == dict.fromkeys(
        ("a.tar/1", "a.tar/2", "a.tar/3"), "missing_member"
    )
    assert "1.left.jpg, 1.right.jpg, 1.caption.txt" in details["a.tar/1"][1]
    assert "3.depth.png" in details["a.tar/3"][1]
    counts = index_shards([path])
    assert (counts.samples, counts.rejected) == (1, Counter({"missing_member": 3}))
    assert counts.not_read == {"member .input.jpg": 1, "member .target.jpg": 1}


def test_odd_dots_lose_no_member(tmp_path: Path) -> None:
    files = {"a.b.txt": b"x", "a.b..jpg": JPEG, "c.txt": b"A cat.", "c...jpg": PNG, "d..txt": b"x", "d..jpg": JPEG}
    assert list(keys(write(tmp_path / "a.tar", files))) == ["c", "d"]


def test_members_beside_a_complete_sample_are_counted_by_name(tmp_path: Path) -> None:
    extra = {"3.mask.png": PNG, "3.cls": b"4", "3.left.txt": b"x", "3.7.npy": b"x", "._3.jpg": b"x", "README": b"x"}
    path = write(tmp_path / "a.tar", {**pairs("3"), **extra})
    assert scan_shard(path).not_read == {
        "member .mask.png": 1,
        "member .cls": 1,
        "member .left.txt": 1,
        "member .npy": 1,
        "hidden member": 1,
        "member": 1,
    }
    assert list(keys(path)) == ["3"]
    drafts, rejected = read(opened(path))
    assert (len(drafts), rejected) == (1, [])


def test_links_are_rejected_with_the_sample_that_they_would_be_part_of(tmp_path: Path) -> None:
    files = pairs("a.1", "a.2", "b")
    del files["a.1.jpg"]
    path = write(tmp_path / "a.tar", files, links=("a.1.jpg", "b.mask.jpg", "c.jpg"))
    assert list(keys(path)) == ["a.2", "b"]
    assert [(key, error.reason) for key, error in scan_shard(path).rejected] == [
        ("a.1", "not_a_file"),
        ("b.mask", "not_a_file"),
        ("c", "not_a_file"),
    ]


def test_webdatasets_convention_is_kept(tmp_path: Path) -> None:
    """Keys are those that the library webdataset itself finds, also where numbers and folders have dots."""
    files: dict[str, bytes] = {}
    for key in ("v1.2/000", "v1.2/001", "a b", "x-y_z"):
        files |= {
            f"{key}.json": b"{}",
            f"{key}.0.jpg": JPEG,
            f"{key}.1.PNG": PNG,
            f"{key}.0.mp4": b"x",
            f"{key}.cls": b"1",
        }
    path = write(tmp_path / "a.tar", files)
    expected = {sample["__key__"] for sample in wds.WebDataset(str(path), shardshuffle=False)}
    assert set(keys(path)) == expected
    assert set(map(len, keys(path).values())) == {4}


def test_random_names_give_the_right_pairs_or_a_rejection(tmp_path: Path) -> None:
    rng = random.Random(5)
    path = tmp_path / "a.tar"
    whole = 0
    for _ in range(150):
        names = {"".join(rng.choices("ab01. (", k=rng.randint(1, 5))).strip("./ ") or "a" for _ in range(6)}
        files = pairs(*names)
        for lost in rng.sample(sorted(files), rng.choice((0, 0, 1, 2))):
            del files[lost]
        order = sorted(files, key=lambda _: rng.random())
        write(path, {name: files[name] for name in order})
        drafts, rejected = read(opened(path))
        check_accounts(path, scan_shard(path))
        for draft in drafts:
            if draft.images:  # a caption is never given to another image
                assert f"a.tar/{draft.record['text']}" == draft.origin
        if len(files) == 2 * len(names):
            whole += 1
            assert {draft.record["text"] for draft in drafts} == names
            assert rejected == []
    assert whole > 40
