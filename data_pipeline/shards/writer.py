"""Write samples to shards: plain tar files in the webdataset layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from xxhash import xxh3_64_intdigest

from common.files import name_file, sync_folder
from data_pipeline.errors import DataError
from data_pipeline.shards.members import MAX_BYTES, Member, ShardSample, is_key, kind_of
from data_pipeline.shards.tar import end_mark, header, padding


class ShardWriter:
    """Writes NAME-00000.tar, NAME-00001.tar ... in a folder, a new one when max_bytes is reached.

    Every shard is written under a temporary name, flushed to disk and renamed when it is complete. The same samples
    give the same bytes. As a context manager it closes at the end; after an error it leaves no unfinished shard behind.

    Attributes:
        path: The shard that the last sample went to.
        finished: The complete shards.
    """

    def __init__(self, folder: str | Path, name: str, max_bytes: int) -> None:
        self.folder, self.name, self.max_bytes = Path(folder), name, max_bytes
        self.finished: list[Path] = []
        self.path = self._numbered(0)
        self._file: BinaryIO | None = None
        self._size = 0

    def write(self, key: str, files: Sequence[tuple[str, bytes]]) -> ShardSample:
        """Append one sample.

        Args:
            key: Its key.
            files: (extension, bytes) of each of its members.

        Returns:
            Where its members lie, with their checksums, so that the tar need not be read again to be indexed.

        Raises:
            DataError: The key would be read back as another one, or a tar cannot hold a member.
        """
        if not is_key(key):
            raise DataError(f"{key!r} cannot be a key: no dot in its last part, no empty part, no '..'")
        headers = []
        for extension, data in files:  # all checks come first: after an error the shard is as it was
            kind, _ = kind_of(extension)
            if kind is not None and len(data) > MAX_BYTES[kind]:
                raise DataError(f"{key}.{extension} has {len(data)} bytes, {MAX_BYTES[kind]} are allowed: cut it")
            headers.append(header(f"{key}.{extension}", len(data)))
        if self._file is not None and self._size >= self.max_bytes:
            self._finish()
        if self._file is None:
            self.path, self._size = self._numbered(len(self.finished)), 0
            self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115 - closed in _finish
        sample = ShardSample(key)
        parts: list[bytes] = []
        for head, (extension, data) in zip(headers, files, strict=True):
            kind, _ = kind_of(extension)
            offset = self._size + len(head)
            if kind is not None:
                sample.members.append(Member(kind, offset, len(data), xxh3_64_intdigest(data)))
            gap = padding(len(data))
            parts += (head, data, gap)
            self._size = offset + len(data) + len(gap)
        self._append(self._file, parts)
        return sample

    def close(self) -> None:
        """Complete the last shard."""
        if self._file is not None:
            self._finish()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self.close()
        finally:
            if self._file is not None:
                self._file.close()
                self._temporary.unlink(missing_ok=True)

    @property
    def _temporary(self) -> Path:
        return self.path.with_suffix(".tar.tmp")

    def _numbered(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:05d}.tar"

    def _finish(self) -> None:
        assert self._file is not None
        self._append(self._file, [end_mark(self._size)])
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        self._file = None
        sync_folder(self.folder)
        self.finished.append(self.path)

    def _append(self, file: BinaryIO, parts: Sequence[bytes]) -> None:
        try:
            _write_all(file, parts)
        except OSError as error:
            name_file(error, self.path)
            raise


def _write_all(file: BinaryIO, parts: Sequence[bytes]) -> None:
    """Write all parts in as few system calls as the kernel allows (1024 parts each, 2 GiB), without joining them."""
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
