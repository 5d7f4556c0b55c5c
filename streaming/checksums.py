"""Checksums of tensors and files, computed while they are written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

from model.checkpoint_manifest import BLOCK_BYTES
from model.errors import ConfigError
from streaming.direct_writer import DirectWriter

ALGORITHMS: dict[str, tuple[str, Callable[[], Any]]] = {
    "xxh3": ("xxh3_64", xxhash.xxh3_64),
    "sha256": ("sha256", hashlib.sha256),
}

NOT_WHAT_WAS_WRITTEN = "has another checksum than when it was written; copy or make it again"


def check_algorithm(name: str) -> None:
    """Raise ConfigError for an unknown algorithm."""
    if name not in ALGORITHMS:
        raise ConfigError(f"--checksum {name} is unknown: use {' or '.join(ALGORITHMS)}")


class TensorChecksum:
    """The checksum of a tensor's values in memory order, of which rows come one after another."""

    def __init__(self, algorithm: str) -> None:
        self.key, new = ALGORITHMS[algorithm]
        self._digest: Any = new()

    def update(self, rows: Tensor) -> None:
        """Add rows."""
        content: Any = rows.contiguous().view(-1).view(torch.uint8).numpy()
        self._digest.update(memoryview(content))

    def entry(self, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
        """Return the tensor's entry in a manifest."""
        return {"dtype": str(dtype)[6:], "shape": list(shape), self.key: self._digest.hexdigest()}


class Checksums:
    """The checksums of one tensor as it is written, and as it is read where it is known what that should be."""

    def __init__(self, algorithm: str, expected: Mapping[str, Any] | None) -> None:
        self._written = TensorChecksum(algorithm)
        self._expected = expected
        read_with = next((name for name, (key, _) in ALGORITHMS.items() if expected and key in expected), None)
        self._read = TensorChecksum(read_with) if read_with else None

    def update(self, read: Tensor, written: Tensor) -> None:
        """Add rows."""
        self._written.update(written)
        if self._read is not None:
            self._read.update(read)

    def entry(self, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
        """Return the tensor's entry in the new manifest."""
        return self._written.entry(dtype, shape)

    def is_damaged(self, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        """Return whether something else was read than expected."""
        return self._read is not None and self._read.entry(dtype, shape) != self._expected


class HashingFile:
    """A file that is written from its beginning to its end, with one checksum per block, as the manifest has them."""

    def __init__(self, writer: DirectWriter) -> None:
        self._writer = writer
        self._digest = xxhash.xxh3_64()
        self._checksums: list[str] = []
        self.size = 0

    def write(self, data: Any) -> int:
        """Write bytes."""
        view = memoryview(data).cast("B")
        self._writer.write(view)
        while len(view):
            left = BLOCK_BYTES - self.size % BLOCK_BYTES
            self._digest.update(view[:left])
            self.size += min(left, len(view))
            view = view[left:]
            if self.size % BLOCK_BYTES == 0:
                self._end_block()
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Do nothing: torch.save flushes each tensor, and the writer flushes all at its end."""

    def entry(self) -> dict[str, Any]:
        """Return the file's entry in a manifest."""
        if self.size % BLOCK_BYTES or not self._checksums:
            self._end_block()
        return {"bytes": self.size, "xxh3_64": self._checksums}

    def _end_block(self) -> None:
        self._checksums.append(self._digest.hexdigest())
        self._digest = xxhash.xxh3_64()
