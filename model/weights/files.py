"""Files of a folder of weights, of which any bytes can be read: on a disk, or behind a URL (`model.weights.remote`)."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Protocol

from common.storage import patiently

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightFile(Protocol):
    """A file that is open for reading."""

    name: str  # for messages
    size: int

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer with the bytes from `offset` on. Raises EOFError if the file ends before."""


class LocalFile:
    """A file on a disk, read without a memory map: only the buffers of the reader take memory.

    With `once`, what was read is not kept in the page cache: it is larger than memory and is not read again.
    """

    def __init__(self, path: Path, *, once: bool = False) -> None:
        self.name = str(path)
        self._once = once
        self._descriptor = patiently(lambda: os.open(path, os.O_RDONLY), path)
        self.size = os.fstat(self._descriptor).st_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer with the bytes from `offset` on. Raises EOFError, StorageError."""
        done = 0
        while done < len(buffer):
            count = patiently(partial(os.preadv, self._descriptor, [buffer[done:]], offset + done), self.name)
            if count == 0:
                raise EOFError(f"{self.name} ends at byte {offset + done:,}")
            done += count
        if self._once:
            os.posix_fadvise(self._descriptor, offset, done, os.POSIX_FADV_DONTNEED)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def read_bytes(file: WeightFile, offset: int, count: int) -> bytes:
    """Return bytes of a file."""
    buffer = bytearray(count)
    file.read_into(memoryview(buffer), offset)
    return bytes(buffer)
