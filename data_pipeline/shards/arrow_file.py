r"""Arrow files that are safe to open: they end with a checksum, which is checked before anything else is read.

    the bytes of an Arrow IPC file | b"xxh3sum\n" | XXH3 of those bytes, 64 bits, big-endian

Arrow trusts what it reads: a flipped bit in an offset makes it read memory that is not there, and the process dies. A
file that fails its checksum is never given to it. The checksum is part of the file, so one rename puts both in place
and one download fetches both. Other programs read such a file without its last 16 bytes (`head -c -16`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
from xxhash import xxh3_64

from data_pipeline.errors import DataError

_MARK = b"xxh3sum\n"
_SEAL_BYTES = len(_MARK) + xxh3_64().digest_size
_CHUNK = 1 << 20


@contextmanager
def new_arrow_file(
    path: Path, schema: pa.Schema, metadata: Mapping[str, str] | None = None
) -> Iterator[pa.RecordBatchFileWriter]:
    """Yield a writer of batches to `path`, which is complete when the context ends.

    Args:
        path: A temporary name: flushing to disk and renaming is left to the caller (`common.files.replacing`).
        schema: The columns.
        metadata: For the file's footer.
    """
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema, metadata=metadata) as writer:
        yield writer
    with open(path, "r+b") as file:
        file.write(_MARK + _digest(file, path.stat().st_size))


def open_arrow_file(path: Path, fix: str) -> pa.RecordBatchFileReader:
    """Open a file, memory-mapped.

    The checksum is taken by reading, not through the mapping, so that the bytes do not count as memory of this process.

    Args:
        path: The file.
        fix: What to do if it is damaged, for the end of the message.

    Raises:
        DataError: The file is not what was written, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size - _SEAL_BYTES
            digest = _digest(file, size)
            if size < 0 or file.read() != _MARK + digest:
                raise DataError(f"{path} is damaged (its bytes are not those of its checksum): {fix}")
        with pa.memory_map(str(path)) as mapped:  # the batches keep the mapping: closing only saves a descriptor
            return pa.ipc.open_file(mapped.read_buffer(size))
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # Arrow's own errors of damage have no number
            raise DataError(f"{path} cannot be read ({error.strerror}): make it a readable file, or {fix}") from error
        raise DataError(f"{path} is damaged ({error}): {fix}") from error


def _digest(file: BinaryIO, size: int) -> bytes:
    """Return the checksum of the next `size` bytes."""
    checksum = xxh3_64()
    while size > 0 and (chunk := file.read(min(size, _CHUNK))):
        checksum.update(chunk)
        size -= len(chunk)
    return checksum.digest()
