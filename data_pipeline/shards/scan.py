"""Read the members of a tar that any program wrote, and group them into samples."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from xxhash import xxh3_64

from data_pipeline.errors import BadSample, DataError
from data_pipeline.shards.members import IMAGE_EXTENSIONS, MAX_BYTES, VIDEO_EXTENSIONS, Member, ShardSample, kind_of
from data_pipeline.shards.tar import DIRECTORY, REGULAR, Damage, TarMember, walk

_MEDIA_ENDINGS = tuple(f".{extension}" for extension in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))

# The first bytes of compressed files, and the program that unpacks them.
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\3\4": "unzip",
}
_CHUNK = 1 << 20


@dataclass
class Scan:
    """What a tar holds."""

    samples: list[ShardSample] = field(default_factory=list)  # in the order in which their keys first appear
    rejected: list[tuple[str, BadSample]] = field(default_factory=list)  # (key, why); key "" where it is not known
    rejected_members: Counter[str] = field(default_factory=Counter)  # members of rejected samples, by key as above
    not_read: Counter[str] = field(default_factory=Counter)  # members of other kinds, by what they are called
    skipped_media: dict[str, str] = field(default_factory=dict)  # by key: an image or video not numbered, KEY.left.jpg


def scan_shard(path: Path) -> Scan:
    """Walk a tar written by any program (USTAR, PAX or GNU), and group its members into samples by key.

    The members of a sample may lie anywhere in the tar. Members of other kinds are not read. Nothing is unpacked, and
    memory is bounded. These are rejected, each with its reason: what lies behind or inside a cut (truncated_tar) or a
    damaged header (damaged_tar), members that lead out of a folder (path_traversal), links, devices and sparse files
    (not_a_file), members too large to be held in memory (member_too_large), samples with two files of one kind and
    number (duplicate_key) or with a gap between their images or videos (missing_member).

    Raises:
        DataError: The file is not a plain tar.
    """
    scan = _Scanner()
    with open(path, "rb", buffering=0) as file:
        _check_first_bytes(path, file.read(512))
        members = 0
        for member in walk(file):
            members += isinstance(member, TarMember)
            scan.add(file, member)
    result = scan.result()
    if result.rejected and not members:
        raise DataError(f"{path} is not a plain tar file ({result.rejected[0][1].detail}): copy it again, or remove it")
    return result


def count_members(path: Path) -> int:
    """Count the files, links and other members of a tar, folders excepted; 0 if it is not a tar."""
    with open(path, "rb", buffering=0) as file:
        return sum(isinstance(member, TarMember) and member.type != DIRECTORY for member in walk(file))


class _Scanner:
    """Sorts the members of one tar."""

    def __init__(self) -> None:
        self._scan = Scan()
        self._members: dict[str, dict[tuple[str, int], Member]] = {}  # by key, then by kind and number
        self._broken: set[str] = set()  # keys

    def add(self, file: BinaryIO, member: TarMember | Damage) -> None:
        key, kind, number = _parse_name(member.name)
        known_key = key if kind else ""
        if isinstance(member, Damage):
            self._reject(known_key, member.reason, member.detail, members=0)
        elif member.type == DIRECTORY:
            pass
        elif not _is_safe(member.name):
            self._reject(known_key, "path_traversal", f"{member.name} leads out of the shard")
        elif member.type != REGULAR:
            what = f"{member.name} is a link, a device or a sparse file (type {member.type.decode('latin-1')})"
            self._reject(known_key, "not_a_file", what)
        elif kind is None:
            self._scan.not_read[f"member {PurePosixPath(member.name).suffix.lower()}".rstrip()] += 1
            if member.name.lower().endswith(_MEDIA_ENDINGS) and not PurePosixPath(member.name).name.startswith("."):
                self._scan.skipped_media[key] = member.name
        elif member.size > MAX_BYTES[kind]:
            detail = f"{member.name} has {member.size} bytes, {MAX_BYTES[kind]} are allowed"
            self._reject(key, "member_too_large", detail)
        elif (kind, number) in self._members.get(key, {}):
            self._reject(key, "duplicate_key", f"{member.name} is {kind} {number} of its sample, as is another file")
        else:
            stored = Member(kind, member.offset, member.size, _checksum(file, member))
            self._members.setdefault(key, {})[kind, number] = stored

    def result(self) -> Scan:
        """Make samples of the members of all keys that are not broken."""
        for key, members in self._members.items():
            if key in self._broken:
                self._scan.rejected_members[key] += len(members)
            elif gap := _gap(members):
                self._scan.rejected.append((key, BadSample("missing_member", gap)))
                self._scan.rejected_members[key] += len(members)
            else:
                ordered = sorted(members.items(), key=lambda item: item[0][1])
                self._scan.samples.append(ShardSample(key, [member for _, member in ordered]))
        return self._scan

    def _reject(self, key: str, reason: str, detail: str, members: int = 1) -> None:
        self._broken.add(key)
        self._scan.rejected_members[key] += members
        self._scan.rejected.append((key, BadSample(reason, detail)))


def _check_first_bytes(path: Path, block: bytes) -> None:
    if not block:
        raise DataError(f"{path} is empty: copy it again, or remove it")
    for beginning, command in _COMPRESSED.items():
        if block.startswith(beginning) and block[257:262] != b"ustar":
            raise DataError(
                f"{path} is not a plain tar file: samples are read in any order, which compression prevents; "
                f"unpack it first, with {command}"
            )


def _parse_name(name: str) -> tuple[str, str | None, int]:
    """Return key, kind and number: `sub/0007.1.png` -> `sub/0007`, `image`, 1. No kind: a file that is not read."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    kind, number = kind_of(extension)
    return str(path.parent / stem), kind if stem else None, number  # an empty stem is a hidden file


def _is_safe(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/")


def _gap(members: dict[tuple[str, int], Member]) -> str | None:
    """Say which image or video is missing although a later one exists."""
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
