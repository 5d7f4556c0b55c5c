"""Write a Hugging Face folder of a source of weights: `model.safetensors`, or shards with an index.

The header of every file follows from names, shapes and dtypes, so the files have their size from the beginning, and
processes write tensors into them where they belong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from common.files import sync_file, write_json
from model.errors import CheckpointError
from model.hf_file_names import CHECKSUMS
from model.weights.files import INDEX, SINGLE, WeightFile, read_bytes
from model.weights.header import LENGTH_BYTES, make_header
from model.weights.source import WeightSource, rows_of
from streaming.checksums import NOT_WHAT_WAS_WRITTEN, Checksums
from streaming.direct_writer import DirectWriter
from streaming.portion import PORTION_BLOCKS, Report, grouped


class Spot(NamedTuple):
    """Where a tensor is written."""

    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class HfJob:
    """Writes the weights of a source as safetensors."""

    def __init__(
        self,
        source: WeightSource,
        *,
        dtype_of: Callable[[str], torch.dtype],
        max_shard_bytes: int,
        block_bytes: int,
        checksum: str,
        identity: dict[str, Any],
        hf_files: Callable[[Path], None],
        expected: Mapping[str, Any] | None = None,
        row_multiple: int = 1,
        single: str = SINGLE,
    ) -> None:
        """Plan the folder.

        Args:
            source: The weights.
            dtype_of: Returns the dtype in which a tensor is written.
            max_shard_bytes: Largest file of weights; a file holds at least one tensor.
            block_bytes: Bytes of rows to read at a time.
            checksum: A key of streaming.checksums.ALGORITHMS.
            identity: What identifies the source.
            hf_files: Writes the other files of the folder.
            expected: Entries of the source's tensors in a manifest, for comparison with what is read.
            row_multiple: Rows that the source makes together, of which a part costs as much as all.
            single: Name of the file, if one holds all weights.
        """
        self.source, self.block_bytes, self.checksum, self.hf_files = source, block_bytes, checksum, hf_files
        self._row_multiple = row_multiple
        self.expected = expected or {}
        tensors = {name: (dtype_of(name), source.shape(name)) for name in source.names()}
        nbytes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (dtype, shape) in tensors.items()}
        self._headers: dict[str, bytes] = {}
        self._file_bytes: dict[str, int] = {}
        self._spots: dict[str, Spot] = {}
        shards = list(grouped(nbytes.items(), max_shard_bytes))
        for number, shard in enumerate(shards, 1):
            file = single if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._plan_file(file, {name: tensors[name] for name in shard.names})
        self._total_bytes = sum(nbytes.values())
        self.portions = list(grouped(((name, nbytes[name]) for name in self._spots), PORTION_BLOCKS * block_bytes))
        self.identity = {
            **identity,
            "tensors": hashlib.sha256(repr(tensors).encode()).hexdigest(),
            "max_shard_bytes": max_shard_bytes,
            "block": block_bytes,
            "checksum": checksum,
        }

    def _plan_file(self, file: str, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Lay out a file."""
        self._headers[file], stored = make_header(tensors)
        self._spots |= {name: Spot(file, each.offset, each.dtype, each.shape) for name, each in stored.items()}
        self._file_bytes[file] = len(self._headers[file]) + sum(each.nbytes for each in stored.values())

    def begin(self, folder: Path) -> None:
        """Make the files of weights with their headers.

        They have their size, and zeros for what is not written yet. So `config.json`, without which nothing loads a
        folder, comes last.
        """
        for file, header in self._headers.items():
            with (folder / file).open("wb") as stream:
                stream.write(header)
                stream.truncate(self._file_bytes[file])

    def write(self, number: int, folder: Path, report: Report) -> dict[str, Any]:
        """Write the tensors of a portion, and return their checksums."""
        entries = {}
        with ExitStack() as files:
            writer = None
            for name in self.portions[number].names:
                spot = self._spots[name]
                path, position = folder / spot.file, spot.offset
                if writer is None or path != writer.path:  # within a file, the tensors of a portion are without gaps
                    writer = files.enter_context(DirectWriter(path, position))
                entries[name] = self._write_tensor(name, writer, report)
        return entries

    def _write_tensor(self, name: str, writer: DirectWriter, report: Report) -> dict[str, Any]:
        spot = self._spots[name]
        checksums = Checksums(self.checksum, self.expected.get(name))
        step = rows_of(self.block_bytes, spot.shape, torch.float32)
        step = max(1, step // self._row_multiple) * self._row_multiple
        for start in range(0, spot.shape[0], step):
            read = self.source.rows(name, start, min(start + step, spot.shape[0]))
            rows = read.to(spot.dtype).contiguous()
            checksums.update(read, rows)
            content: Any = rows.view(-1).view(torch.uint8).numpy()
            writer.write(memoryview(content))
            report(rows.nbytes)
        if checksums.is_damaged(self.source.dtype(name), spot.shape):
            raise CheckpointError(f"{self.source.where(name)} is damaged: tensor {name} {NOT_WHAT_WAS_WRITTEN}")
        return checksums.entry(spot.dtype, spot.shape)

    def finish(self, folder: Path, results: list[Any]) -> None:
        """Write the index, the checksums and the other files."""
        if len(self._headers) > 1:
            files = {name: self._spots[name].file for name in self._spots}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": files}
            write_json(folder / INDEX, index)
        tensors = {name: entry for result in results for name, entry in result.items()}
        headers = {file: xxhash.xxh3_64(header).hexdigest() for file, header in self._headers.items()}
        write_json(folder / CHECKSUMS, {"headers": headers, "tensors": tensors})
        self.hf_files(folder)
        for path in folder.iterdir():
            if path.is_file():
                sync_file(path)


def header_checksum(file: WeightFile) -> str:
    """Return the checksum of a file's header, as it is stored."""
    length = int.from_bytes(read_bytes(file, 0, min(LENGTH_BYTES, file.size)), "little")
    return xxhash.xxh3_64(read_bytes(file, 0, min(LENGTH_BYTES + length, file.size))).hexdigest()
