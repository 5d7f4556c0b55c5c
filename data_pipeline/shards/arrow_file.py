"""Arrow files that are safe to open: with a checksum behind them, looked at before anything else is.

    the bytes of an Arrow IPC file | b"xxh3sum\\n" | XXH3 of those bytes, 64 bits, big-endian

Arrow trusts what it reads: a flipped bit in an offset sends it to memory that is not there, and the process dies. A
file that fails its checksum is never handed to it. The checksum stands in the same file, so one rename puts both in
place, one download fetches both, and there is no pair that could disagree. Who wants to read such a file with other
programs cuts off the last 16 bytes (`head -c -16`).
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
    """A writer of batches to `path`, which is whole when the context ends. metadata: what stands in the file's end."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema, metadata=metadata) as writer:
        yield writer
    with open(path, "r+b") as file:
        file.write(_MARK + _digest(file, path.stat().st_size))


def open_arrow_file(path: Path, mend: str) -> pa.RecordBatchFileReader:
    """Opens a file, memory-mapped. Raises DataError, which ends with `mend`, if it is not what was written.

    The bytes are looked at by reading, not through the mapping: so they do not count as memory of this process."""
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size - _SEAL_BYTES
            digest = _digest(file, size)
            if size < 0 or file.read() != _MARK + digest:
                raise DataError(f"{path} is damaged (its bytes are not those of its checksum): {mend}")
        with pa.memory_map(str(path)) as mapped:  # the batches keep the mapping: closing only saves a descriptor
            return pa.ipc.open_file(mapped.read_buffer(size))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged ({error}): {mend}") from error


def _digest(file: BinaryIO, size: int) -> bytes:
    """The checksum of the next `size` bytes."""
    checksum = xxh3_64()
    while size > 0 and (chunk := file.read(min(size, _CHUNK))):
        checksum.update(chunk)
        size -= len(chunk)
    return checksum.digest()
