"""Read the members of a tar that any program wrote, and group them into samples."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from xxhash import xxh3_64

from data_pipeline.errors import BadSample, DataError
from data_pipeline.shards.grouping import TEXTS, Found, group_members
from data_pipeline.shards.members import MAX_BYTES, Member, ShardSample, kind_of
from data_pipeline.shards.tar import DIRECTORY, REGULAR, Damage, TarMember, walk

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
    not_read: Counter[str] = field(default_factory=Counter)  # members that are in no sample, by what they are called
    has_media: bool = False  # there is an image or video, whatever becomes of it
    skipped_media: dict[str, str] = field(default_factory=dict)  # by key: an image or video beside it, KEY.left.jpg


def scan_shard(path: Path, first: int = 0) -> Scan:
    """Walk a tar written by any program (USTAR, PAX or GNU), and group its members into samples by key.

    The members of a sample may lie anywhere in the tar; grouping.py says which belong together. Members of other kinds
    are counted in `not_read`. Nothing is unpacked, and memory is bounded. These are rejected, each with its reason:
    what lies behind or inside a cut (truncated_tar) or a damaged header (damaged_tar), members that lead out of a
    folder (path_traversal), links, devices and sparse files (not_a_file), members too large to be held in memory
    (member_too_large), samples with two files of one kind and number (duplicate_key) or with a gap between their images
    or videos (missing_member).

    Args:
        path: The tar.
        first: Stop after this many members, at the end of a sample; 0: read all. For a look at a large tar.

    Raises:
        DataError: The file is not a plain tar.
    """
    scan = _Scanner()
    with open(path, "rb", buffering=0) as file:
        _check_first_bytes(path, file.read(512))
        members = 0
        for member in walk(file):
            if first and members >= first and not scan.has_key(member.name):
                break
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
        self._found: dict[str, list[Found]] = {}  # by key

    def add(self, file: BinaryIO, member: TarMember | Damage) -> None:
        key, extension = _split_name(member.name)
        kind = _kind_of_last(extension)
        if isinstance(member, Damage):
            self._reject(key, kind, extension, member.reason, member.detail, count=0)
        elif member.type == DIRECTORY:
            pass
        elif not _is_safe(member.name):
            self._reject(key, kind, extension, "path_traversal", f"{member.name} leads out of the shard")
        elif member.type != REGULAR:
            what = f"{member.name} is a link, a device or a sparse file (type {member.type.decode('latin-1')})"
            self._reject(key, kind, extension, "not_a_file", what)
        elif kind is None:
            self._scan.not_read[_called(member.name)] += 1
        elif member.size > MAX_BYTES[kind]:
            detail = f"{member.name} has {member.size} bytes, {MAX_BYTES[kind]} are allowed"
            self._reject(key, kind, extension, "member_too_large", detail)
        else:
            stored = Member(kind, member.offset, member.size, _checksum(file, member))
            self._found.setdefault(key, []).append(Found(extension, kind, stored))

    def has_key(self, name: str) -> bool:
        """Return whether a member of this name belongs to a sample that is known."""
        return _split_name(name)[0] in self._found

    def result(self) -> Scan:
        """Make samples of the members."""
        for key, found in self._found.items():
            group = group_members(key, found)
            self._scan.has_media |= any(one.kind not in TEXTS for one in found)
            self._scan.rejected += group.errors
            self._scan.rejected_members.update(group.rejected)
            for unread in group.not_read:
                self._scan.not_read[_called(f"KEY.{unread.extension}")] += 1
                if unread.kind not in TEXTS:
                    self._scan.skipped_media[key] = f"{key}.{unread.extension}"
            for sample_key, members in group.members.items():
                ordered = sorted(members.items(), key=lambda item: item[0][1])
                self._scan.samples.append(ShardSample(sample_key, [member for _, member in ordered]))
        return self._scan

    def _reject(self, key: str, kind: str | None, extension: str, reason: str, detail: str, count: int = 1) -> None:
        error = BadSample(reason, detail)
        if kind:
            self._found.setdefault(key, []).append(Found(extension, kind, None, error, count))
        else:
            self._scan.rejected_members[""] += count
            self._scan.rejected.append(("", error))


def _check_first_bytes(path: Path, block: bytes) -> None:
    if not block:
        raise DataError(f"{path} is empty: copy it again, or remove it")
    for beginning, command in _COMPRESSED.items():
        if block.startswith(beginning) and block[257:262] != b"ustar":
            raise DataError(
                f"{path} is not a plain tar file: samples are read in any order, which compression prevents; "
                f"unpack it first, with {command}"
            )


def _split_name(name: str) -> tuple[str, str]:
    """Return the key and what follows the first dot: `sub/0007.1.png` -> `sub/0007`, `1.png`."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.parent / stem), extension if stem else ""  # an empty stem is a hidden file


def _kind_of_last(extension: str) -> str | None:
    """Return the kind of a member, as in Member, or None for one that is not read: `left.jpg` -> image."""
    return kind_of(extension.rpartition(".")[2])[0] if extension else None


def _called(name: str) -> str:
    """Return what a member that is not read is counted as: `member .cls`, `member .mask.png`."""
    path = PurePosixPath(name)
    if path.name.startswith("."):
        return "hidden member"
    words = [word for word in path.suffixes if re.fullmatch(r"\.[A-Za-z_]{1,20}", word)]
    known = _kind_of_last(path.suffix.lstrip("."))
    return f"member {''.join(words[-2:]) if known else path.suffix.lower()}".rstrip()


def _is_safe(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/")


def _checksum(file: BinaryIO, member: TarMember) -> int:
    checksum, end = xxh3_64(), member.offset + member.size
    for offset in range(member.offset, end, _CHUNK):
        checksum.update(os.pread(file.fileno(), min(_CHUNK, end - offset), offset))
    return checksum.intdigest()
