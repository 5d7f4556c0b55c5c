"""Shards: plain tar files in the webdataset layout, written in order and read at random.

A sample is the members that share the name up to the first dot: KEY.json (its record), KEY.0.jpg, KEY.1.png ...
(pictures in order), KEY.0.mp4 ... (clips in order). Foreign shards may also hold one picture as KEY.jpg and its
caption as KEY.txt, as img2dataset writes them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from xxhash import xxh3_64, xxh3_64_intdigest

from data_pipeline.errors import BadSample, DataError
from data_pipeline.remote import ShardCache, is_url, shown
from data_pipeline.tar import DIRECTORY, REGULAR, Damage, TarMember, end_mark, header, padding, size_in, walk

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
VIDEO_EXTENSIONS = ("mp4", "mkv", "webm", "mov", "avi")
_MEDIA_ENDINGS = tuple(f".{extension}" for extension in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))
# The most bytes a member may have, by its kind: a reader holds it in memory, and Linux reads 2 GiB at once.
MAX_BYTES = {"json": 1 << 28, "txt": 1 << 28, "image": 1 << 30, "video": 0x7FFFF000}

# How compressed files begin, and what unpacks them.
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\3\4": "unzip",
}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Member:
    """Where the bytes of one file lie in its tar. kind: what it holds, `json`, `txt`, `image` or `video`.

    xxh3: 64-bit checksum of its bytes. Checking costs a fifth of what CRC-32 does, and next to nothing beside reading.
    """

    kind: str
    offset: int
    size: int
    xxh3: int


@dataclass
class ShardSample:
    """A sample of a shard, its members in the order of their numbers."""

    key: str
    members: list[Member] = field(default_factory=list)


@dataclass(frozen=True)
class RawSample:
    """A sample's bytes: its record, its pictures and its clips."""

    record: dict[str, Any]
    images: list[bytes]
    videos: list[bytes]


# --- writing ----------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes NAME-00000.tar, NAME-00001.tar ... in a folder, a new one when max_bytes is reached.

    Every shard is written under a temporary name and renamed when it is whole; the same samples give the same bytes.
    path: the shard that the last sample went to; finished: the shards that are whole. As a context manager it closes
    at the end, and leaves no unfinished shard behind if there was an error.
    """

    def __init__(self, folder: str | Path, name: str, max_bytes: int):
        self.folder, self.name, self.max_bytes = Path(folder), name, max_bytes
        self.finished: list[Path] = []
        self.path = self._numbered(0)
        self._file: BinaryIO | None = None
        self._size = 0

    def write(self, key: str, files: Sequence[tuple[str, bytes]]) -> ShardSample:
        """Appends one sample, files given as (extension, bytes); returns where its members lie, with the checksum of
        each, so that the tar need not be read again to be indexed. Raises DataError for a key that would be read as
        another one, or for what a tar cannot hold."""
        if not _is_key(key):
            raise DataError(f"{key!r} cannot be a key: no dot in its last part, no empty part, no '..'")
        headers = [header(f"{key}.{extension}", len(data)) for extension, data in files]
        if self._file is not None and self._size >= self.max_bytes:
            self._finish()
        if self._file is None:
            self.path, self._size = self._numbered(len(self.finished)), 0
            self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115 - closed in _finish
        sample = ShardSample(key)
        parts: list[bytes] = []
        for head, (extension, data) in zip(headers, files, strict=True):
            kind, _ = _kind(extension)
            if kind is not None and len(data) > MAX_BYTES[kind]:
                raise DataError(f"{key}.{extension} has {len(data)} bytes, {MAX_BYTES[kind]} are allowed: cut it")
            offset = self._size + len(head)
            if kind is not None:
                sample.members.append(Member(kind, offset, len(data), xxh3_64_intdigest(data)))
            gap = padding(len(data))
            parts += (head, data, gap)
            self._size = offset + len(data) + len(gap)
        _write_all(self._file, parts)
        return sample

    def close(self) -> None:
        if self._file is not None:
            self._finish()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.close()
        elif self._file is not None:
            self._file.close()
            self._temporary.unlink()

    @property
    def _temporary(self) -> Path:
        return self.path.with_suffix(".tar.tmp")

    def _numbered(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:05d}.tar"

    def _finish(self) -> None:
        assert self._file is not None
        _write_all(self._file, [end_mark(self._size)])
        self._file.close()
        self._file = None
        os.replace(self._temporary, self.path)
        self.finished.append(self.path)


def _write_all(file: BinaryIO, parts: Sequence[bytes]) -> None:
    """All parts in as few system calls as the kernel allows (1024 parts each, 2 GiB), nothing copied together."""
    waiting = [memoryview(part) for part in parts if part]
    while waiting:
        written = os.writev(file.fileno(), waiting[:1024])
        done = 0
        while done < len(waiting) and written >= len(waiting[done]):
            written -= len(waiting[done])
            done += 1
        waiting = waiting[done:]
        if written:
            waiting[0] = waiting[0][written:]


# --- reading what others wrote ----------------------------------------------------------------------------------------


@dataclass
class Scan:
    """What a tar holds: samples in the order in which their keys first appear, and what was set aside, by key.
    passed_over: by key, the last picture or clip whose name says no number, as KEY.left.jpg."""

    samples: list[ShardSample] = field(default_factory=list)
    rejected: list[tuple[str, BadSample]] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)


def scan_shard(path: Path) -> Scan:
    """Walks a tar written by any program (USTAR, PAX or GNU) and groups its members into samples by key, wherever in
    the tar they lie. Members of other kinds are passed over. Nothing is unpacked, and memory is bounded.

    Set aside, each with its reason: what is behind or inside a cut (truncated_tar) or a damaged header (damaged_tar),
    members that lead out of a folder (path_traversal), links, devices and sparse files (not_a_file), members too large
    to be held (member_too_large), samples with two files in one place (duplicate_key) or with a gap between their
    pictures or clips (missing_member). Raises DataError if the file is not a plain tar.
    """
    scan = Scan()
    found: dict[str, dict[tuple[str, int], Member]] = {}
    broken: set[str] = set()

    def reject(key: str, reason: str, detail: str) -> None:
        broken.add(key)
        scan.rejected.append((key, BadSample(reason, detail)))

    with open(path, "rb", buffering=0) as file:
        _check_beginning(path, file.read(512))
        members = 0
        for member in walk(file):
            key, kind, number = _place(member.name)
            members += isinstance(member, TarMember)
            if isinstance(member, Damage):
                reject(key if kind else "", member.reason, member.detail)
            elif member.type == DIRECTORY:
                continue
            elif not _is_safe(member.name):
                reject(key if kind else "", "path_traversal", f"{member.name} leads out of the shard")
            elif member.type != REGULAR:
                what = f"{member.name} is a link, a device or a sparse file (type {member.type.decode('latin-1')})"
                reject(key if kind else "", "not_a_file", what)
            elif kind is None:
                if member.name.lower().endswith(_MEDIA_ENDINGS) and not PurePosixPath(member.name).name.startswith("."):
                    scan.passed_over[key] = member.name
            elif member.size > MAX_BYTES[kind]:
                reject(key, "member_too_large", f"{member.name} has {member.size} bytes, {MAX_BYTES[kind]} are allowed")
            elif (kind, number) in found.get(key, {}):
                reject(key, "duplicate_key", f"{member.name} has a place that another file of its sample has")
            else:
                checksum = _checksum(file, member)
                found.setdefault(key, {})[kind, number] = Member(kind, member.offset, member.size, checksum)
    if scan.rejected and not members:
        raise DataError(f"{path} is not a plain tar file ({scan.rejected[0][1].detail}): copy it again, or remove it")
    for key, places in found.items():
        if key in broken:
            continue
        if gap := _gap(places):
            scan.rejected.append((key, BadSample("missing_member", gap)))
        else:
            ordered = sorted(places.items(), key=lambda item: item[0][1])
            scan.samples.append(ShardSample(key, [member for _, member in ordered]))
    return scan


def _check_beginning(path: Path, block: bytes) -> None:
    if not block:
        raise DataError(f"{path} is empty: copy it again, or remove it")
    for beginning, command in _COMPRESSED.items():
        if block.startswith(beginning) and block[257:262] != b"ustar":
            raise DataError(
                f"{path} is not a plain tar file: samples are read at random, which compression prevents; "
                f"unpack it first, with {command}"
            )


def _place(name: str) -> tuple[str, str | None, int]:
    """`sub/0007.1.png` -> key `sub/0007`, kind `image`, number 1. No kind: not a file that we read."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    kind, number = _kind(extension)
    return str(path.parent / stem), kind if stem else None, number  # an empty stem is a hidden file


def _kind(extension: str) -> tuple[str | None, int]:
    """`json` -> (json, 0); `3.jpg` -> (image, 3); `jpg` -> (image, 0); what we do not read -> (None, 0)."""
    number, _, last = extension.lower().rpartition(".")
    if last in ("json", "txt") and not number:
        return last, 0
    kind = "image" if last in IMAGE_EXTENSIONS else "video" if last in VIDEO_EXTENSIONS else None
    return (kind, int(number or 0)) if re.fullmatch("[0-9]{0,9}", number) else (None, 0)


def _is_safe(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/")


def _is_key(key: str) -> bool:
    *folders, last = key.split("/")
    return (
        bool(last) and "." not in last and "\0" not in key and all(folder not in ("", ".", "..") for folder in folders)
    )


def _gap(members: dict[tuple[str, int], Member]) -> str | None:
    """Says which picture or clip is not there although a later one is."""
    for kind in ("image", "video"):
        numbers = sorted(number for other, number in members if other == kind)
        for expected, number in enumerate(numbers):
            if number != expected:
                return f"{kind} {number} without {kind} {expected}"
    return None


def _checksum(file: BinaryIO, member: TarMember) -> int:
    checksum, end = xxh3_64(), member.offset + member.size
    for offset in range(member.offset, end, _CHUNK):
        checksum.update(os.pread(file.fileno(), min(_CHUNK, end - offset), offset))
    return checksum.intdigest()


# --- reading at random ------------------------------------------------------------------------------------------------


class ShardReader:
    """Reads samples out of tars at random; keeps the most recently used files open.

    cache: where copies of shards that are URLs are kept.
    """

    def __init__(self, keep_open: int = 64, cache: ShardCache | None = None):
        self.keep_open, self.cache = keep_open, cache or ShardCache()
        self._open: OrderedDict[str, int] = OrderedDict()
        self._fetched_again: set[str] = set()

    def read(self, path: str, sample: ShardSample, tar_fingerprint: str = "") -> RawSample:
        """Reads and checks one sample. path: a file or URL; tar_fingerprint: of the tar as it was indexed, which a URL
        needs.

        Raises BadSample: `unreadable_shard` where the tar is missing, shorter than its index says, or another one;
        `checksum` where it is the right one but bytes of this sample have changed; `bad_record`.
        """
        contents: dict[str, list[bytes]] = {"json": [], "txt": [], "image": [], "video": []}
        for member, data in zip(sample.members, self.read_members(path, sample, tar_fingerprint), strict=True):
            contents[member.kind].append(data)
        return RawSample(parse_record(contents["json"], contents["txt"]), contents["image"], contents["video"])

    def read_members(self, path: str, sample: ShardSample, tar_fingerprint: str = "") -> list[bytes]:
        """The bytes of a sample's members as they are. Raises BadSample as `read` does."""
        try:
            return self._read(path, sample, tar_fingerprint)
        except BadSample:
            if not is_url(path) or path not in self._open or path in self._fetched_again:
                raise
        # A copy in the cache may be bad although the shard is good.
        self._fetched_again.add(path)
        self._close(path)
        self.cache.discard(path, tar_fingerprint)
        return self._read(path, sample, tar_fingerprint)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _read(self, path: str, sample: ShardSample, tar_fingerprint: str) -> list[bytes]:
        descriptor = self._descriptor(path, tar_fingerprint)
        try:
            contents = [os.pread(descriptor, member.size, member.offset) for member in sample.members]
        except OSError as error:
            self._close(path)
            raise BadSample("unreadable_shard", f"{path}: {error.strerror}") from error
        for member, data in zip(sample.members, contents, strict=True):
            if xxh3_64_intdigest(data) != member.xxh3:
                raise self._changed(path, descriptor, member, len(data), tar_fingerprint)
        return contents

    @staticmethod
    def _changed(path: str, descriptor: int, member: Member, got: int, tar_fingerprint: str) -> BadSample:
        """What is wrong with bytes that are not those of the index."""
        size = os.fstat(descriptor).st_size
        if got < member.size or (tar_fingerprint and size != size_in(tar_fingerprint)):
            return BadSample(
                "unreadable_shard",
                f"{shown(path)} has {size} bytes and is not what was indexed: copy it again, or run "
                f"{index_command(shown(path))}",
            )
        return BadSample("checksum", f"its {member.kind} of {member.size} bytes differs from what was indexed")

    def _descriptor(self, path: str, tar_fingerprint: str) -> int:
        descriptor = self._open.get(path, -1)
        if descriptor >= 0:
            self._open.move_to_end(path)
            return descriptor
        self._let_go()
        try:
            descriptor = self.cache.open(path, tar_fingerprint) if is_url(path) else os.open(path, os.O_RDONLY)
        except OSError as error:
            raise BadSample("unreadable_shard", f"{path} cannot be opened ({error.strerror}): restore it") from error
        self._open[path] = descriptor
        return descriptor

    def _let_go(self) -> None:
        """Makes room for one more, and closes files that were removed or replaced: they take up room on the disk."""
        for path, descriptor in list(self._open.items()):
            if os.fstat(descriptor).st_nlink == 0 or len(self._open) >= self.keep_open:
                self._close(path)

    def _close(self, path: str) -> None:
        os.close(self._open.pop(path))


def parse_record(jsons: Sequence[bytes], texts: Sequence[bytes]) -> dict[str, Any]:
    """KEY.json as it is, or KEY.txt as the caption of a picture where there is no JSON that names a domain."""
    if len(jsons) > 1 or len(texts) > 1:
        raise BadSample("bad_record", "two samples of the shard have this key")
    try:
        record = json.loads(jsons[0]) if jsons else {}
        if texts and not (isinstance(record, dict) and "domain" in record):
            return {"domain": "image_text", "text": texts[0].decode("utf-8").strip()}
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_record", f"the record cannot be read: {error}") from error
    if not isinstance(record, dict) or not record:
        raise BadSample("bad_record", "the sample has no KEY.json with an object in it")
    return record


def index_command(path: str | Path) -> str:
    return f"`python -m tools.shard index {shlex.quote(str(path))} --tokenizer DIR`"
