"""Shards: plain tar files in the webdataset layout, written in order and read at random.

A sample is the members that share the name up to the first dot: KEY.json (its record), KEY.0.jpg, KEY.1.png ...
(pictures in order), KEY.0.mp4 ... (clips in order). Foreign shards may also hold one picture as KEY.jpg and its
caption as KEY.txt, as img2dataset writes them.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.errors import BadSample, DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
VIDEO_EXTENSIONS = ("mp4", "mkv", "webm", "mov", "avi")
_BLOCK = 512


@dataclass(frozen=True)
class Member:
    """Where the bytes of one file lie in its tar. kind: what it holds, `json`, `txt`, `image` or `video`."""

    kind: str
    offset: int
    size: int
    crc32: int


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


class ShardWriter:
    """Writes NAME-00000.tar, NAME-00001.tar ... in a folder, a new one when max_bytes is reached.

    Every shard is written under a temporary name and renamed when it is whole. finished: the shards written so far.
    """

    def __init__(self, folder: str | Path, name: str, max_bytes: int):
        self.folder, self.name, self.max_bytes = Path(folder), name, max_bytes
        self.finished: list[Path] = []
        self._tar: tarfile.TarFile | None = None

    def write(self, key: str, files: Sequence[tuple[str, bytes]]) -> Path:
        """Appends one sample, files given as (extension, bytes); returns the shard it went to."""
        if self._tar is not None and self._tar.offset >= self.max_bytes:
            self._finish()
        if self._tar is None:
            temporary = self._path.with_suffix(".tar.tmp")
            self._tar = tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed in _finish
        for extension, data in files:
            header = tarfile.TarInfo(f"{key}.{extension}")
            header.size = len(data)
            self._tar.addfile(header, io.BytesIO(data))
        return self._path

    def close(self) -> None:
        if self._tar is not None:
            self._finish()

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.name}-{len(self.finished):05d}.tar"

    def _finish(self) -> None:
        assert self._tar is not None
        self._tar.close()
        self._tar, path = None, self._path
        os.replace(path.with_suffix(".tar.tmp"), path)
        self.finished.append(path)


def scan_shard(path: Path) -> list[ShardSample]:
    """Walks a tar written by any program (USTAR, PAX or GNU) and groups its members into samples by key, in the order
    in which keys first appear. Members of other kinds are passed over.

    Raises DataError if the tar is compressed, damaged or cut short.
    """
    size = path.stat().st_size
    found: dict[str, list[tuple[int, Member]]] = {}
    with open(path, "rb") as file:
        try:
            # Names that are no UTF-8 are kept apart, and can still be written down.
            with tarfile.open(fileobj=file, mode="r:", errors="backslashreplace") as tar:
                for info in tar:
                    if info.offset_data + info.size > size:
                        raise DataError(f"{path} is cut short inside {info.name}: copy it again")
                    name = PurePosixPath(info.name)
                    stem, _, extension = name.name.partition(".")
                    kind, number = _kind(extension)
                    if not info.isfile() or kind is None or not stem:  # an empty stem is a hidden file
                        continue
                    crc32 = zlib.crc32(os.pread(file.fileno(), info.size, info.offset_data))
                    member = Member(kind, info.offset_data, info.size, crc32)
                    found.setdefault(str(name.parent / stem), []).append((number, member))
                end = tar.offset
        except DataError:
            raise
        except Exception as error:  # tarfile raises nearly anything on damaged headers
            raise DataError(
                f"{path} is not a plain tar file ({error}): unpack it if it is compressed, else copy it again"
            ) from error
        # tarfile takes the end of the file for the end of the archive; where it stopped, there must be a mark.
        marks = (os.pread(file.fileno(), _BLOCK, offset) for offset in (max(end - _BLOCK, 0), end))
        if bytes(_BLOCK) not in marks:
            raise DataError(f"{path} has no end-of-archive mark: its tail is missing, copy it again")
    return [
        ShardSample(key, [member for _, member in sorted(numbered, key=lambda pair: pair[0])])
        for key, numbered in found.items()
    ]


def _kind(extension: str) -> tuple[str | None, int]:
    """`json` -> (json, -1); `3.jpg` -> (image, 3); `jpg` -> (image, 0); what we do not read -> (None, 0)."""
    number, _, last = extension.lower().rpartition(".")
    if last in ("json", "txt") and not number:
        return last, -1
    if number and not number.isdecimal():
        return None, 0
    kind = "image" if last in IMAGE_EXTENSIONS else "video" if last in VIDEO_EXTENSIONS else None
    return kind, int(number or 0)


class ShardReader:
    """Reads samples out of tars at random; keeps the most recently used files open."""

    def __init__(self, keep_open: int = 64):
        self.keep_open = keep_open
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, sample: ShardSample) -> RawSample:
        """Reads and checks one sample. Raises DataError if the shard is missing or cut short, BadSample if bytes of
        the sample are not those that were indexed or its record cannot be read."""
        descriptor = self._descriptor(path)
        contents: dict[str, list[bytes]] = {"json": [], "txt": [], "image": [], "video": []}
        for member in sample.members:
            data = os.pread(descriptor, member.size, member.offset)
            if len(data) != member.size:
                raise DataError(f"{path} is shorter than its index says: copy it again, or run {index_command(path)}")
            if zlib.crc32(data) != member.crc32:
                raise BadSample("checksum", f"a {member.kind} of {member.size} bytes differs from what was indexed")
            contents[member.kind].append(data)
        return RawSample(parse_record(contents["json"], contents["txt"]), contents["image"], contents["video"])

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, path: str) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"shard {path} cannot be opened ({error.strerror}): restore it") from error
        self._open[path] = descriptor
        if len(self._open) > self.keep_open:
            os.close(self._open.popitem(last=False)[1])
        return descriptor


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
    return f"`python -m tools.shard index {path} --tokenizer DIR`"
