"""Write a file of the weights of a Hugging Face folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.weights.header import make_header


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
