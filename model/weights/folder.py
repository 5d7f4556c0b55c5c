"""Read the weights of a Hugging Face folder: `model.safetensors`, or shards with an index.

Rows of tensors are read when they are asked for; only the headers are read ahead. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.errors import WeightsError
from model.finite import nonfinite
from model.weights.files import INDEX, SINGLE, WeightFile, read_bytes
from model.weights.header import HeaderError, StoredTensor, read_header
from model.weights.remote import has_file, open_file, title
from model.weights.source import some


class SafetensorsFolder:
    """The tensors of a Hugging Face folder as they are stored, read when they are asked for.

    Of the local copy of a folder behind a URL (`model.weights.remote`), the weights are read from the URL.

    `model.weights.formats.opened` sees other formats of weights as the published one.

    Raises:
        WeightsError: the folder holds no safetensors; or a shard is missing, truncated or lacks a tensor that the index
            lists.
    """

    def __init__(self, folder: str | Path, *, once: bool = False) -> None:
        self.folder = Path(folder)
        self.title = title(self.folder)  # the folder in messages
        self._once = once  # see LocalFile
        self._file: dict[str, WeightFile] = {}
        self._stored: dict[str, StoredTensor] = {}
        self._matrices: dict[str, tuple[int, int]] = {}
        for path, listed in self._files().items():
            self._add_file(path, listed)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that one tensor has on disk."""
        return self._stored[name].dtype

    def matrices(self, name: str) -> tuple[int, int]:
        """Return how many matrices are above each other in one tensor, and the rows of each."""
        return self._matrices.get(name, (1, (*self.shape(name), 1)[0]))

    def fold(self, name: str) -> None:
        """See a stack of matrices [matrices, rows, columns] as one matrix [matrices * rows, columns] from now on."""
        stored = self._stored[name]
        matrices, rows, columns = stored.shape
        self._matrices[name] = matrices, rows
        self._stored[name] = stored._replace(shape=(matrices * rows, columns))

    def where(self, name: str) -> str:
        """Return the file of one tensor."""
        return self._file[name].name

    def tensor(self, name: str) -> Tensor:
        """Read one whole tensor. Raises WeightsError as `rows`."""
        return self._checked(name, self.unchecked_tensor(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read the indices [start, stop) of a tensor's first dimension, in the dtype that it has on disk.

        Raises:
            WeightsError: a value is NaN or infinite, or the file has changed.
        """
        return self._checked(name, self.unchecked_rows(name, start, stop))

    def unchecked_tensor(self, name: str) -> Tensor:
        """Read one whole tensor, whatever its values."""
        shape = self._stored[name].shape
        return self.unchecked_rows(name, 0, shape[0]) if shape else self._read(name, 0, ())

    def unchecked_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows of one tensor, whatever their values."""
        stored = self._stored[name]
        return self._read(name, start * stored.row_bytes, (stop - start, *stored.shape[1:]))

    def _read(self, name: str, skipped_bytes: int, shape: tuple[int, ...]) -> Tensor:
        stored = self._stored[name]
        tensor = torch.empty(shape, dtype=stored.dtype)
        content: Any = tensor.view(-1).view(torch.uint8).numpy()
        try:
            self._file[name].read_into(memoryview(content), stored.offset + skipped_bytes)
        except EOFError as error:
            raise WeightsError(f"{error}, within tensor {name}: the file has changed since it was opened") from None
        return tensor

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if nonfinite({name: tensor}):
            raise WeightsError(
                f"{self._file[name].name}: tensor {name} has values that are not finite (NaN or infinity): these "
                "weights are damaged; copy or download them again"
            )
        return tensor

    # --- files --------------------------------------------------------------------------------------------------------

    def _files(self) -> Mapping[str, set[str] | None]:
        """Return the files and the tensors that the index lists for each; None without an index."""
        single = has_file(self.folder, SINGLE)
        if (self.folder / INDEX).is_file() and single:
            raise WeightsError(
                f"{self.title} has both {SINGLE} and {INDEX}, which may be two different models: remove the one that "
                "is not meant"
            )
        if (self.folder / INDEX).is_file():
            return self._read_index(self.folder / INDEX)
        if single:
            return {SINGLE: None}
        raise WeightsError(f"{self.title} has neither {SINGLE} nor {INDEX}: it holds no safetensors weights")

    def _read_index(self, index: Path) -> dict[str, set[str] | None]:
        try:
            files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            listed: dict[str, Any] = {shard: set() for shard in sorted(set(files.values()))}
            for name, shard in files.items():
                listed[shard].add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{self.title}/{INDEX} is not an index of safetensors shards: {error!r}") from None
        for shard in listed:
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise WeightsError(
                    f"{self.title}/{INDEX} names the shard {shard!r}, which is not a file of its own folder"
                )
        if missing := [shard for shard in listed if not has_file(self.folder, shard)]:
            raise WeightsError(f"{self.title} lacks {some(missing)}, which {INDEX} names: copy the missing files")
        return listed

    def _add_file(self, shard: str, listed: set[str] | None) -> None:
        file = open_file(self.folder, shard, once=self._once)
        try:
            held = read_header(partial(read_bytes, file), file.size)
        except (HeaderError, EOFError) as error:
            raise WeightsError(
                f"{file.name} cannot be read as safetensors ({error}): copy or download it again"
            ) from None
        if listed is not None and (lost := sorted(listed - held.keys())):
            raise WeightsError(f"{self.title}/{INDEX} lists tensors that its shards do not hold: {some(lost)}")
        if listed is not None and (stray := sorted(held.keys() - listed)):
            raise WeightsError(f"{self.title}/{INDEX} does not list tensors that its shards hold: {some(stray)}")
        for name, stored in held.items():
            self._file[name], self._stored[name] = file, stored
