"""Read and write the weights of a Hugging Face folder: `model.safetensors`, or shards with an index.

Tensors are read one at a time; only the headers are read ahead. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.files import write_json
from model.errors import WeightsError
from model.finite import nonfinite

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# The dtypes a weight may have, by their names in a safetensors header.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, read when they are asked for.

    Raises:
        WeightsError: the folder holds no safetensors; a shard is missing, truncated or lacks a tensor that the index
            lists; or a tensor is not stored as plain floating point (float8 needs scales, which are not applied).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._opened: dict[Path, Any] = {}
        self._file: dict[str, Path] = dict(self._find())
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, torch.dtype] = {}
        for name, path in self._file.items():
            header = self._open(path).get_slice(name)
            if header.get_dtype() not in DTYPES:
                raise WeightsError(
                    f"{path}: tensor {name} is stored as {header.get_dtype()}; quantised and integer weights are not "
                    f"supported: use the {', '.join(DTYPES)} release of this model"
                )
            self._shape[name] = tuple(header.get_shape())
            self._dtype[name] = DTYPES[header.get_dtype()]

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return self._shape[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that one tensor has on disk."""
        return self._dtype[name]

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, in the shape and dtype that it has on disk.

        Raises:
            WeightsError: a value is NaN or infinite.
        """
        tensor = self.unchecked_tensor(name)
        if nonfinite({name: tensor}):
            raise WeightsError(
                f"{self._file[name]}: tensor {name} has values that are not finite (NaN or infinity): these weights "
                "are damaged; copy or download them again"
            )
        return tensor

    def unchecked_tensor(self, name: str) -> Tensor:
        """Read one tensor, whatever its values."""
        return self._open(self._file[name]).get_tensor(name)

    def first_bytes(self, name: str, values: int) -> bytes:
        """Return the first values of one tensor as they are on disk; rows of a matrix count whole."""
        stored = self._open(self._file[name]).get_slice(name)
        rows = max(1, values // max(1, prod(self._shape[name][1:])))
        return bytes(stored[:rows].contiguous().view(torch.uint8).numpy())

    def _find(self) -> Iterator[tuple[str, Path]]:
        """Yield every tensor's name and the file that holds it."""
        if (self.folder / INDEX).is_file():
            yield from self._read_index(self.folder / INDEX)
        elif (self.folder / SINGLE).is_file():
            path = self.folder / SINGLE
            yield from ((name, path) for name in self._open(path).keys())  # noqa: SIM118 (no dict)
        else:
            raise WeightsError(f"{self.folder} has neither {SINGLE} nor {INDEX}: it holds no safetensors weights")

    def _read_index(self, index: Path) -> Iterator[tuple[str, Path]]:
        try:
            files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            shards = sorted(set(files.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index} is not an index of safetensors shards: {error!r}") from None
        for shard in shards:
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise WeightsError(f"{index} names the shard {shard!r}, which is not a file of its own folder")
        if missing := [shard for shard in shards if not (self.folder / shard).is_file()]:
            raise WeightsError(f"{self.folder} lacks {some(missing)}, which {INDEX} names: copy the missing files")
        held = {shard: set(self._open(self.folder / shard).keys()) for shard in shards}
        if lost := [name for name, shard in files.items() if name not in held[shard]]:
            raise WeightsError(f"{index} lists tensors that its shards do not hold: {some(lost)}")
        if stray := sorted(set().union(*held.values()) - set(files)):
            raise WeightsError(f"{index} does not list tensors that its shards hold: {some(stray)}")
        yield from ((name, self.folder / shard) for name, shard in files.items())

    def _open(self, path: Path) -> Any:
        if path not in self._opened:
            try:
                self._opened[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise WeightsError(
                    f"{path} cannot be read as safetensors ({error}): copy or download it again"
                ) from None
        return self._opened[path]


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


def some(names: list[str], limit: int = 8) -> str:
    """Return the first few of a list of names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
