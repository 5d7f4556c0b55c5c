"""Write the weights of a Hugging Face folder: `model.safetensors`, or shards with an index."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from common.files import write_json
from model.weights.files import INDEX, SINGLE
from model.weights.header import make_header


class SafetensorsWriter:
    """Write tensors to `folder` in the order given, in shards of at most `max_shard_bytes` (but at least one tensor).

    Shards have temporary names until `close` knows their number; the index is written last.

    Raises:
        OSError: a file cannot be written.
    """

    def __init__(self, folder: str | Path, max_shard_bytes: int) -> None:
        self.folder = Path(folder)
        self.max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor, which is held in memory until its shard is full."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_shard_bytes:
            self._write_shard()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write the last shard and give every file its name. Without this call the folder holds no weights."""
        if self._pending or not self._shards:
            self._write_shard()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for number, final in enumerate(names):
            self._temporary(number).chmod(self.folder.stat().st_mode & 0o666)  # safetensors writes for the owner alone
            os.replace(self._temporary(number), self.folder / final)
        if count > 1:
            files = {name: final for shard, final in zip(self._shards, names, strict=True) for name in shard}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": files}
            write_json(self.folder / INDEX, index)

    def _write_shard(self) -> None:
        # Tensors sliced from one buffer share storage, which save_file refuses: give each its own.
        tensors = {
            name: t.clone() if t.untyped_storage().nbytes() != t.nbytes else t for name, t in self._pending.items()
        }
        path = self._temporary(len(self._shards))
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from None  # a full disk, or one that may not be written
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self.folder / f".model-{number + 1:05d}.safetensors.tmp"


class ShardFile:
    """One safetensors file that is filled with tensors in any order; its header is written at once.

    Args:
        path: File to make.
        tensors: Dtype and shape of each tensor that it will hold.
        metadata: What its header says beside "format".

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        header, self._stored = make_header(tensors, metadata)
        self._file = path.open("wb")
        self._file.write(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; it is not kept."""
        stored = self._stored.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (stored.dtype, stored.shape), name
        content: Any = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy()
        self._file.seek(stored.offset)
        self._file.write(memoryview(content))

    def close(self) -> None:
        """Flush the file to disk."""
        assert not self._stored, "tensors were not written"
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
