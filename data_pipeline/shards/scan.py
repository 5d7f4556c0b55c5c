"""Read the members of a tar that any program wrote, and group them into samples."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from xxhash import xxh3_64

from data_pipeline.errors import BadSample, DataError
from data_pipeline.shards.members import IMAGE_EXTENSIONS, MAX_BYTES, VIDEO_EXTENSIONS, Member, ShardSample, kind_of
from data_pipeline.shards.tar import DIRECTORY, REGULAR, Damage, TarMember, walk

_MEDIA_ENDINGS = tuple(f".{extension}" for extension in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))

# How compressed files begin, and what unpacks them.
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
    kind, number = kind_of(extension)
    return str(path.parent / stem), kind if stem else None, number  # an empty stem is a hidden file


def _is_safe(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/")


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
