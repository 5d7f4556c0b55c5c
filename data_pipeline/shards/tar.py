"""The tar format: headers for writing shards, and a walk over the members of any tar that survives damage.

A tar is blocks of 512 bytes: a header, the file's bytes, zeros up to the next block, and so on; blocks of zeros end it.
Names longer than 100 bytes and sizes from 8 GiB on need extensions: members of type L (GNU tar) or x (POSIX, PAX) that
precede the member that they describe. Shards are written as plain USTAR; all three formats are read.

Python's tarfile takes ten times as long to write a header, reads an extension of any size into memory, and mistakes
damage for the end of the archive.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import DataError

BLOCK = 512
RECORD = 20 * BLOCK  # a complete tar is padded to a multiple of this
MAX_SIZE = 0o77777777777  # 8 GiB - 1: the largest number of 11 octal digits
MAX_EXTENSION = 1 << 20  # bytes of a long name or of PAX records
REGULAR, DIRECTORY, SPARSE = b"0", b"5", b"S"
_REGULAR = (REGULAR, b"\0", b"7")  # also as written before POSIX, and "contiguous", which is the same today
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_ZEROS = bytes(BLOCK)
_CHUNK = 1 << 20


def fingerprint(path: Path) -> str:
    """Return size and checksum of both ends: they change when a tar is rewritten, not when it is copied or touched."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(65536)
        tail = os.pread(file.fileno(), 65536, max(0, size - 65536))
    return f"{size}-{zlib.crc32(tail, zlib.crc32(head)):08x}"


def size_in(tar_fingerprint: str) -> int:
    """Return the size of the tar that had this fingerprint."""
    return int(tar_fingerprint.partition("-")[0])


# --- writing ----------------------------------------------------------------------------------------------------------

_OWNER = b"0000644\0" + b"0000000\0" + b"0000000\0"  # mode, user, group
_TIME = b"00000000000\0"
_TAIL = REGULAR + bytes(100) + b"ustar\x0000" + bytes(80)  # type, link, magic and version, owner's names, device
_CONSTANT_SUM = sum(_OWNER + _TIME + _TAIL) + 8 * ord(" ")  # the checksum counts its own 8 bytes as spaces


def header(name: str, size: int) -> bytes:
    """Return the 512 bytes before a file's data: always the same for the same name and size.

    Raises:
        DataError: USTAR cannot express it: a name of more than 100 bytes that no `/` splits into at most 155 and at
            most 100 bytes, or a size of 8 GiB and more.
    """
    if size > MAX_SIZE:
        raise DataError(f"{name} has {size} bytes: a shard's member must be smaller than 8 GiB, cut it into parts")
    prefix, short = b"", name.encode()
    if len(short) > 100:
        prefix, short = _split(short)
    digits = b"%011o" % size
    checksum = _CONSTANT_SUM + sum(short) + sum(prefix) + sum(digits)
    return b"".join(
        (short.ljust(100, b"\0"), _OWNER, digits, b"\0", _TIME, b"%06o\0 " % checksum, _TAIL, prefix.ljust(167, b"\0"))
    )


def padding(size: int) -> bytes:
    """Return the zeros that follow `size` bytes of data."""
    return _ZEROS[: -size % BLOCK]


def end_mark(size: int) -> bytes:
    """Return the zeros that end a tar of `size` bytes."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % RECORD)


def _split(name: bytes) -> tuple[bytes, bytes]:
    cut = name.find(b"/", max(len(name) - 101, 1))
    if not 0 < cut <= 155 or cut == len(name) - 1:
        raise DataError(f"{name.decode()} is too long for a tar: use keys of at most 90 bytes, or folders in them")
    return name[:cut], name[cut + 1 :]


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TarMember:
    """A file or folder in a tar."""

    name: str
    type: bytes  # REGULAR, DIRECTORY, SPARSE or another of the tar format
    offset: int  # of its bytes
    size: int


@dataclass(frozen=True)
class Damage:
    """A part of a tar that cannot be read."""

    reason: str  # as in BadSample
    detail: str
    name: str = ""  # the member's, if it is known


def walk(file: BinaryIO) -> Iterator[TarMember | Damage]:
    """Yield all members of a tar and its damaged parts in order. Only headers are read, bounded bytes of each.

    After a damaged header reading continues at the next intact one. A tar whose end mark is missing ends with a Damage,
    and so does one whose last member is cut short. Concatenated tars are read as one.
    """
    size = file.seek(0, os.SEEK_END)
    offset = 0
    extended: dict[str, str] = {}  # from extensions: the path and size of the next member
    while True:
        block = _read(file, offset, BLOCK)
        if len(block) < BLOCK:
            yield Damage("truncated_tar", f"ends after {size} bytes without an end mark")
            return
        member = None if block == _ZEROS else _parse(block, offset)
        if member is None:
            following = _next_header(file, offset + BLOCK)
            if not _all_zeros(file, offset, size if following is None else following):
                yield Damage("damaged_tar", f"no readable header at byte {offset}")
            if following is None:
                return
            offset, extended = following, {}
            continue
        if re.fullmatch("[0-9]{1,18}", extended.get("size", "")):
            member = TarMember(member.name, member.type, member.offset, int(extended["size"]))
        end = member.offset + member.size
        offset = end + -member.size % BLOCK
        if member.type in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
            if end > size:  # perhaps by more than a file can have
                yield Damage("truncated_tar", f"a header has {max(size - member.offset, 0)} of {member.size} bytes")
                return
            if member.size > MAX_EXTENSION:
                yield Damage("damaged_tar", f"a header of {member.size} bytes at byte {member.offset}")
                extended = {"path": ""}  # the name of the next member is not known
            else:
                extended |= _extension(member.type, _read(file, member.offset, member.size))
            continue
        name = extended.get("path", member.name)
        kind = SPARSE if any(key.startswith("GNU.sparse") for key in extended) else member.type
        extended = {}
        if end > size:
            yield Damage("truncated_tar", f"{name} has {max(size - member.offset, 0)} of {member.size} bytes", name)
            return
        yield TarMember(name, REGULAR if kind in _REGULAR else kind, member.offset, member.size)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _parse(block: bytes, offset: int) -> TarMember | None:
    """Read a header. None if its checksum is wrong or its size is not a number."""
    counted = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    checksum, size = _number(block[148:156]), _number(block[124:136])
    if checksum != counted or size is None:
        return None
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":  # GNU tar keeps times there
        name = prefix + b"/" + name
    kind = block[156:157]
    if kind == b"\0" and name.endswith(b"/"):  # before POSIX; a long name may be cut off after any of its slashes
        kind = DIRECTORY
    # A directory, link or device has no data whatever its size says.
    return TarMember(
        name.decode(errors="replace"), kind, offset + BLOCK, 0 if kind in (b"1", b"2", b"3", b"4", b"5", b"6") else size
    )


def _number(digits: bytes) -> int | None:
    """Read an octal number, or GNU's binary form for sizes from 8 GiB on. None if it is neither."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    text = digits.split(b"\0")[0].strip() or b"0"
    return int(text, 8) if all(digit in b"01234567" for digit in text) else None


def _extension(kind: bytes, data: bytes) -> dict[str, str]:
    r"""Return what an extension says of the next member, {"path": ..., "size": ...}.

    PAX records are `LENGTH KEY=VALUE\n`.
    """
    if kind == _LONG_NAME:
        return {"path": data.split(b"\0")[0].decode(errors="replace")}
    found: dict[str, str] = {}
    while kind == _PAX and data:
        length, space, _ = data.partition(b" ")
        if not (length.isdigit() and len(length) < 8 and len(length) < int(length) <= len(data)):
            break
        key, _, value = data[len(length) + len(space) : int(length)].decode(errors="replace").partition("=")
        found[key] = value.removesuffix("\n")
        data = data[int(length) :]
    return found


def _next_header(file: BinaryIO, offset: int) -> int | None:
    """Return the offset of the first block from `offset` on that is a USTAR header, or None."""
    while chunk := _read(file, offset, _CHUNK):
        found = chunk.find(b"ustar")
        while found >= 0:
            start = found - 257
            block = chunk[start : start + BLOCK] if start >= 0 and start % BLOCK == 0 else b""
            if len(block) == BLOCK and _parse(block, 0):
                return offset + start
            found = chunk.find(b"ustar", found + 1)
        offset += _CHUNK
    return None


def _all_zeros(file: BinaryIO, start: int, stop: int) -> bool:
    chunks = (_read(file, offset, min(_CHUNK, stop - offset)) for offset in range(start, stop, _CHUNK))
    return all(chunk == bytes(len(chunk)) for chunk in chunks)
