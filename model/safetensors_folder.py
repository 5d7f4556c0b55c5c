"""Reading and writing a Hugging Face folder's weights: `model.safetensors`, or shards with an index.

Tensors are read one at a time; only the headers are read ahead. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.files import write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# The dtypes a weight may have, by their names in a safetensors header.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightsError(ValueError):
    """Weights that do not fit the model or cannot be read; the message names the tensors or the file."""


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, read lazily.

    Raises WeightsError if the folder holds no safetensors, a shard is missing, cut short or lacks a tensor that the
    index promises, or a tensor is not stored as plain floating point (float8 needs scales that we do not apply).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[Path, Any] = {}
        self._place: dict[str, Path] = dict(self._find())
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, torch.dtype] = {}
        for name, path in self._place.items():
            header = self._open(path).get_slice(name)
            if header.get_dtype() not in DTYPES:
                raise WeightsError(
                    f"{path}: tensor {name} is stored as {header.get_dtype()}; quantised and integer weights are not "
                    f"read: bring the {', '.join(DTYPES)} release of this model"
                )
            self._shape[name] = tuple(header.get_shape())
            self._dtype[name] = DTYPES[header.get_dtype()]

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._place)

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype[name]

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, in the shape and dtype it has on disk."""
        return self._open(self._place[name]).get_tensor(name)

    def _find(self) -> Iterator[tuple[str, Path]]:
        """Every tensor's name and the shard that holds it."""
        if (self.folder / INDEX).is_file():
            yield from self._read_index(self.folder / INDEX)
        elif (self.folder / SINGLE).is_file():
            path = self.folder / SINGLE
            yield from ((name, path) for name in self._open(path).keys())  # noqa: SIM118 (no dict)
        else:
            raise WeightsError(f"{self.folder} has neither {SINGLE} nor {INDEX}: it holds no weights that we read")

    def _read_index(self, index: Path) -> Iterator[tuple[str, Path]]:
        try:
            places: dict[str, str] = json.loads(index.read_text())["weight_map"]
            shards = sorted(set(places.values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index} is not an index of safetensors shards: {error!r}") from None
        for shard in shards:
            if Path(shard).name != shard:
                raise WeightsError(f"{index} names the shard {shard!r}, which is not a file of its own folder")
        if missing := [shard for shard in shards if not (self.folder / shard).is_file()]:
            raise WeightsError(f"{self.folder} lacks {some(missing)}, which {INDEX} names: copy the missing files")
        held = {shard: set(self._open(self.folder / shard).keys()) for shard in shards}
        if lost := [name for name, shard in places.items() if name not in held[shard]]:
            raise WeightsError(f"{index} promises tensors that its shards do not hold: {some(lost)}")
        if stray := sorted(set().union(*held.values()) - set(places)):
            raise WeightsError(f"{index} does not mention tensors that its shards hold: {some(stray)}")
        yield from ((name, self.folder / shard) for name, shard in places.items())

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise WeightsError(
                    f"{path} cannot be read as safetensors ({error}): copy or download it again"
                ) from None
        return self._files[path]


class SafetensorsWriter:
    """Writes tensors to `folder` in the order given, in shards of at most `max_shard_bytes` (one tensor at least).

    Shards have temporary names until `close` knows their number; the index is written last.
    """

    def __init__(self, folder: str | Path, max_shard_bytes: int) -> None:
        self.folder = Path(folder)
        self.max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it is held in memory until its shard is full."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_shard_bytes:
            self._write_shard()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left and give every file its name. Without this call the folder holds no weights."""
        if self._pending or not self._shards:
            self._write_shard()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for number, final in enumerate(names):
            self._temporary(number).chmod(self.folder.stat().st_mode & 0o666)  # safetensors writes for the owner alone
            os.replace(self._temporary(number), self.folder / final)
        if count > 1:
            places = {name: final for shard, final in zip(self._shards, names, strict=True) for name in shard}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": places}
            write_json(self.folder / INDEX, index)

    def _write_shard(self) -> None:
        # Tensors cut out of one buffer share storage, which save_file refuses: give each its own.
        tensors = {
            name: t.clone() if t.untyped_storage().nbytes() != t.nbytes else t for name, t in self._pending.items()
        }
        save_file(tensors, self._temporary(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self.folder / f".model-{number + 1:05d}.safetensors.tmp"


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB", "500MB" or "1000" (decimal units, as transformers reads them)."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    match = re.fullmatch(r"([0-9]+)\s*([KMGT]?B?)", text.strip().upper())
    if not match or match[2] not in units or int(match[1]) == 0:
        raise WeightsError(f"{text!r} is not a size: write it as 5GB, 500MB or a number of bytes")
    return int(match[1]) * units[match[2]]


def some(names: list[str], limit: int = 8) -> str:
    """The first few of a list of names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
