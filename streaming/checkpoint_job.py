"""Write a checkpoint of a source of weights: a step folder without the state of a run.

A parameter is stored in blocks of rows, each an archive of torch.save, in the files of portions: `state/__N_0.distcp`.
megatron-core reads such a checkpoint at any layout, like one that many ranks have saved.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import save_config
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from common.files import name_file, replacing, sync_file, write_json
from model.checkpoint import HF_FILES, STATE
from model.checkpoint_manifest import BLOCK_BYTES, MANIFEST, file_entry
from model.checkpoint_writer import FORMAT
from model.config import GlmvConfig
from model.errors import WeightsError
from model.weights.source import WeightSource, check_names_and_shapes, rows_of
from model.weights.table import Weight, hf_shapes, sizes, weights
from streaming.checksums import NOT_WHAT_WAS_WRITTEN, Checksums, HashingFile
from streaming.direct_writer import DirectWriter
from streaming.frames import FRAME, Archive, frame_checksum
from streaming.names import place_of
from streaming.portion import PORTION_BLOCKS, Report, grouped

EXPERT_BIAS = ".expert_bias"  # float32, whatever the other parameters are


class CheckpointJob:
    """Writes the weights of a source as a checkpoint."""

    def __init__(
        self,
        source: WeightSource,
        config: GlmvConfig,
        *,
        dtype: torch.dtype,
        block_bytes: int,
        checksum: str,
        identity: dict[str, Any],
        hf_files: Callable[[Path], None],
        expected: Mapping[str, Any] | None = None,
    ) -> None:
        """Plan the checkpoint.

        Args:
            source: The weights.
            config: The model.
            dtype: Dtype of the parameters; expert biases are float32.
            block_bytes: Bytes of rows to read at a time.
            checksum: A key of streaming.checksums.ALGORITHMS.
            identity: What identifies the source.
            hf_files: Fills the folder of the Hugging Face files.
            expected: Entries of the source's tensors in a manifest, for comparison with what is read.

        Raises:
            WeightsError: The source is of another model.
        """
        check_names_and_shapes(source, hf_shapes(config))
        self.expected = expected or {}
        self.source, self.dtype, self.block_bytes, self.checksum, self.hf_files = (
            source,
            dtype,
            block_bytes,
            checksum,
            hf_files,
        )
        self._size = sizes(config)
        self._weights = {weight.name: weight for weight in weights(config)}
        self._places = {name: place_of(name, config) for name in self._weights}
        nbytes = {name: self._nbytes(weight) for name, weight in self._weights.items()}
        self.portions = list(grouped(nbytes.items(), PORTION_BLOCKS * block_bytes))
        self.identity = {**identity, "dtype": str(dtype), "checksum": checksum, "block": block_bytes}

    def begin(self, folder: Path) -> None:
        """Make the folders, and copy the Hugging Face files."""
        (folder / STATE).mkdir()
        (folder / HF_FILES).mkdir()
        self.hf_files(folder / HF_FILES)

    def write(self, number: int, folder: Path, report: Report) -> dict[str, Any]:
        """Write one file of tensors."""
        path = folder / STATE / f"__{number}_0.distcp"  # so that ranks share the work of comparing checksums
        chunks: list[Any] = []
        tensors: dict[str, Any] = {}
        try:
            path.write_bytes(b"")  # a killed conversion may have left a part of it
            with DirectWriter(path, 0) as writer:
                file = HashingFile(writer)
                for name in self.portions[number].names:
                    self._write_parameter(self._weights[name], file, chunks, tensors, report)
        except OSError as error:
            name_file(error, path)
            raise
        archives = [self._archive(path.name, *chunk) for chunk in chunks]
        entry = {**file.entry(), FRAME: frame_checksum(path, archives)}
        return {"name": f"{STATE}/{path.name}", "file": entry, "chunks": chunks, "tensors": tensors}

    def _archive(self, file: str, key: str, _: list[int], shape: list[int], offset: int, length: int) -> Archive:
        dtype = torch.float32 if key.endswith(EXPERT_BIAS) else self.dtype
        return Archive(file, offset, length, dtype, tuple(shape))

    def _write_parameter(
        self, weight: Weight, file: HashingFile, chunks: list[Any], tensors: dict[str, Any], report: Report
    ) -> None:
        place, dtype = self._places[weight.name], self._dtype(weight)
        checksums = {name: Checksums(self.checksum, self.expected.get(name)) for name in weight.hf}
        in_order = self._keeps_order(weight)
        step = rows_of(self.block_bytes, weight.shape, torch.float32)
        for start in range(0, weight.shape[0], step):
            stop = min(start + step, weight.shape[0])
            rows = self._rows(weight, start, stop, dtype, checksums if in_order else {})
            offset = file.size
            torch.save(rows.unsqueeze(0) if place.at else rows, file)  # type: ignore[arg-type] # it only writes
            offsets = [*place.at, start, *(0 for _ in weight.shape[1:])]
            box = [*(1 for _ in place.at), *rows.shape]
            chunks.append([place.key, offsets, box, offset, file.size - offset])
            report(rows.nbytes)
        for name, shape in weight.hf.items():
            if not in_order:
                self._read_in_order(name, dtype, checksums[name])
            if checksums[name].is_damaged(self.source.dtype(name), shape):
                raise WeightsError(f"{self.source.where(name)} is damaged: tensor {name} {NOT_WHAT_WAS_WRITTEN}")
            tensors[name] = checksums[name].entry(dtype, shape)

    def _rows(
        self, weight: Weight, start: int, stop: int, dtype: torch.dtype, checksums: dict[str, Checksums]
    ) -> Tensor:
        """Read rows of a parameter, in the order in which it has them."""
        rows = torch.empty((stop - start, *weight.shape[1:]), dtype=dtype)
        names = list(weight.hf)
        filled = 0
        for piece in weight.pieces(self._size, start, stop):
            name = names[piece.part]
            target = rows[filled : filled + piece.stop - piece.start]
            read = self.source.rows(name, piece.start, piece.stop)
            target.copy_(read)
            if name in checksums:
                checksums[name].update(read, target)
            filled += piece.stop - piece.start
        return rows

    def _keeps_order(self, weight: Weight) -> bool:
        """Return whether the parameter has the rows of each of the folder's tensors in their own order."""
        reached = [0 for _ in weight.hf]
        for part, start, stop in weight.pieces(self._size, 0, weight.shape[0]):
            if start != reached[part]:
                return False
            reached[part] = stop
        return True

    def _read_in_order(self, name: str, dtype: torch.dtype, checksums: Checksums) -> None:
        """Add all rows of a tensor to its checksum."""
        shape = self.source.shape(name)
        step = rows_of(self.block_bytes, shape, torch.float32)
        for start in range(0, shape[0], step):
            read = self.source.rows(name, start, min(start + step, shape[0]))
            checksums.update(read, read.to(dtype))

    def _dtype(self, weight: Weight) -> torch.dtype:
        return torch.float32 if weight.name.endswith(EXPERT_BIAS) else self.dtype

    def _nbytes(self, weight: Weight) -> int:
        return torch.Size(weight.shape).numel() * self._dtype(weight).itemsize

    # --- what joins the portions --------------------------------------------------------------------------------------

    def finish(self, folder: Path, results: list[Any]) -> None:
        """Write the metadata and the manifest."""
        state = folder / STATE
        torch.save({}, state / "common.pt")
        sync_file(state / "common.pt")
        save_config(FORMAT, str(state))
        sync_file(state / "metadata.json")
        with replacing(state / ".metadata") as temporary:
            temporary.write_bytes(pickle.dumps(self.metadata(results)))
        files = {result["name"]: result["file"] for result in results}
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and ".portions" not in path.parts):
            name = path.relative_to(folder).as_posix()
            if name not in files:
                sync_file(path)
                files[name] = file_entry(path)
        tensors = {name: entry for result in results for name, entry in result["tensors"].items()}
        write_json(
            folder / MANIFEST,
            {"block_bytes": BLOCK_BYTES, "files": dict(sorted(files.items())), "tensors": tensors},
        )

    def metadata(self, results: list[Any]) -> Metadata:
        """Return where each tensor is, from the results of all portions."""
        chunks: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
        where = {}
        for result in results:
            file = Path(result["name"]).name
            for key, offsets, shape, offset, length in result["chunks"]:
                chunks[key].append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape)))
                where[MetadataIndex(key, torch.Size(offsets))] = _StorageInfo(file, offset, length)
        tensors: dict[str, Any] = {}
        for name, weight in self._weights.items():
            place = self._places[name]
            if place.key not in tensors:
                size = torch.Size((*place.size, *weight.shape))
                tensors[place.key] = TensorStorageMetadata(
                    TensorProperties(dtype=self._dtype(weight)), size, chunks[place.key]
                )
        return Metadata(tensors, storage_data=where, storage_meta=StorageMeta())
