"""Compare tensors with their checksums while something else is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model.errors import CheckpointError
from model.weights.source import WeightSource
from streaming.checksums import NOT_WHAT_WAS_WRITTEN, Checksums


class Compared:
    """A source whose tensors are compared each time that they have been read from the first row to the last.

    Rows may overlap those that were read before, and follow without a gap.

    Args:
        source: The tensors.
        expected: Entries of tensors in a manifest.
    """

    def __init__(self, source: WeightSource, expected: Mapping[str, Any]) -> None:
        self.source, self.expected = source, expected
        self._reading: dict[str, tuple[Checksums, int]] = {}  # and the rows that the checksums have

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return self.source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        return self.source.dtype(name)

    def where(self, name: str) -> str:
        """Return where one tensor comes from."""
        return self.source.where(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor.

        Raises:
            CheckpointError: these were the last rows, and the tensor is damaged.
        """
        rows = self.source.rows(name, start, stop)
        if name in self.expected:
            self._compare(name, rows, start, stop)
        return rows

    def _compare(self, name: str, rows: Tensor, start: int, stop: int) -> None:
        if start == 0:
            self._reading[name] = Checksums("xxh3", self.expected[name]), 0
        checksums, position = self._reading.pop(name)
        if start > position:
            raise ValueError(f"rows {position} to {start} of {name} were not read, so its checksum is not known")
        new = rows[position - start :]
        checksums.update(new, new)
        shape = self.shape(name)
        if max(stop, position) < shape[0]:
            self._reading[name] = checksums, max(stop, position)
        elif checksums.is_damaged(self.dtype(name), shape):
            raise CheckpointError(f"{self.where(name)} is damaged: tensor {name} {NOT_WHAT_WAS_WRITTEN}")
