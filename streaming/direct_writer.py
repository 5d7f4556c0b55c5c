"""Write a part of a file past the page cache.

A conversion writes more bytes than fit into memory, once. Through the page cache the kernel would have to find and fill
new pages for all of them, which takes more of a processor than the conversion itself, and other programs would lose
theirs. Direct writes need whole 4 kB blocks of the file: what is left at both ends goes through the page cache.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from types import TracebackType

from common.files import name_file

ALIGNMENT = 4096
BUFFER_BYTES = 2**23


class DirectWriter:
    """Writes bytes one after another from an offset of a file that exists; a context.

    Leaving the context flushes them to disk. The file system may refuse direct writes: then all are ordinary ones.
    """

    def __init__(self, path: Path, offset: int) -> None:
        self.path = path
        self.position = offset
        self._file = os.open(path, os.O_WRONLY)
        self._direct = _open_direct(path)
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)
        self._start = self._filled = offset % ALIGNMENT  # of the buffer's bytes, those from _start on are to be written

    def __enter__(self) -> DirectWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write_buffer()
                os.fsync(self._file)
        finally:
            os.close(self._file)
            if self._direct is not None:
                os.close(self._direct)
            self._buffer.close()

    def write(self, data: memoryview) -> None:
        """Write bytes behind those that were written before."""
        while len(data):
            count = min(len(data), BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = data[:count]
            self._filled += count
            self.position += count
            data = data[count:]
            if self._filled == BUFFER_BYTES:
                self._write_buffer()

    def _write_buffer(self) -> None:
        """Write what the buffer holds; its first byte is at a multiple of ALIGNMENT in the file."""
        base = self.position - self._filled
        first = -(-self._start // ALIGNMENT) * ALIGNMENT
        last = max(self._filled // ALIGNMENT * ALIGNMENT, first)
        with memoryview(self._buffer) as view:
            if self._direct is None or last == first:
                self._write(self._file, view, self._start, self._filled, base)
            else:
                self._write(self._file, view, self._start, first, base)
                self._write(self._direct, view, first, last, base)
                self._write(self._file, view, last, self._filled, base)
        self._start = self._filled = 0

    def _write(self, descriptor: int, view: memoryview, start: int, stop: int, base: int) -> None:
        while start < stop:
            try:
                start += os.pwrite(descriptor, view[start:stop], base + start)
            except OSError as error:
                if descriptor != self._direct or error.errno != errno.EINVAL:
                    name_file(error, self.path)
                    raise
                os.close(descriptor)  # it accepts the flag and not the write
                self._direct, descriptor = None, self._file


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise
