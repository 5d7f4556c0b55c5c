"""Checksums of the bytes of a checkpoint's file that are not values: the archives around them.

The values have checksums by tensor, which are compared while they are read. With the frame, every byte of the file has
been compared, and none was read twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash

from model.checkpoint import STATE
from model.checkpoint_manifest import MANIFEST
from model.errors import CheckpointError
from model.weights.files import LocalFile, read_bytes
from streaming.stored_tensors import StoredTensorError, find_values

FRAME = "frame_xxh3_64"


class Archive(NamedTuple):
    """A tensor as torch.save wrote it."""

    file: str
    offset: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def frame_checksum(path: Path, archives: Iterable[Archive]) -> str:
    """Return the checksum of a file without the values in it.

    Raises:
        StoredTensorError: An archive is damaged.
    """
    file = LocalFile(path)
    digest = xxhash.xxh3_64()
    position = 0
    for archive in sorted(archives, key=lambda each: each.offset):
        values = find_values(file, archive.offset, archive.length, archive.dtype, archive.shape)
        digest.update(read_bytes(file, position, values - position))
        position = values + archive.nbytes
    digest.update(read_bytes(file, position, file.size - position))
    return digest.hexdigest()


def check_frame(folder: Path, name: str, expected: str, archives: Iterable[Archive]) -> None:
    """Compare the frame of a file with the manifest.

    Raises:
        CheckpointError: It is not what was written.
    """
    path = folder / STATE / name
    try:
        found = frame_checksum(path, archives)
    except (StoredTensorError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or make the checkpoint again") from None
    if found != expected:
        raise CheckpointError(
            f"{path} is damaged: what surrounds its tensors is not what {MANIFEST} says; copy or make the checkpoint "
            "again"
        )
