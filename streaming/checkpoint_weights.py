"""The weights of a checkpoint as a source of tensors by their Hugging Face names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.checkpoint import STATE
from model.checkpoint_metadata import read_metadata
from model.config import GlmvConfig
from model.errors import CheckpointError
from model.finite import nonfinite
from model.weights.files import LocalFile, WeightFile
from model.weights.source import some
from model.weights.table import Weight, sizes, weights
from model.weights.transforms import Piece
from streaming.frames import Archive
from streaming.names import Place, place_of
from streaming.stored_tensors import StoredTensorError, find_values


class Box(NamedTuple):
    """A part of a parameter that is contiguous in a file."""

    row: int
    rows: int
    columns: tuple[tuple[int, int], ...]  # (offset, size) in each further dimension
    skipped: int  # values in front of it in its archive
    archive: Archive

    @property
    def row_values(self) -> int:
        """Values of one row of the box."""
        return prod(size for _, size in self.columns)


class CheckpointWeights:
    """The weights of a step folder by their Hugging Face names, saved at any layout.

    Raises:
        CheckpointError: It is damaged, of another model, or not safe to read.
    """

    def __init__(self, folder: Path, config: GlmvConfig) -> None:
        self.folder = folder
        self._size = sizes(config)
        self._files: dict[str, WeightFile] = {}
        self._values: dict[Archive, int] = {}  # where the values of an archive begin in its file
        self._boxes: dict[str, list[Box]] = {}
        self._weight: dict[str, tuple[Weight, int]] = {}
        table = list(weights(config))
        for weight in table:
            self._weight |= {name: (weight, part) for part, name in enumerate(weight.hf)}
        self._read_metadata({weight.name: place_of(weight.name, config) for weight in table}, table)

    def _read_metadata(self, places: Mapping[str, Place], table: Sequence[Weight]) -> None:
        """Find the boxes of every parameter."""
        metadata = read_metadata(self.folder / STATE)
        stored: Any = metadata.state_dict_metadata
        if missing := [weight.name for weight in table if places[weight.name].key not in stored]:
            raise CheckpointError(f"{self.folder} does not hold {some(missing)}: it is of another model")
        if wrong := [
            weight.name
            for weight in table
            if tuple(stored[places[weight.name].key].size) != (*places[weight.name].size, *weight.shape)
        ]:
            raise CheckpointError(f"{self.folder} has other shapes than its config.json: {some(wrong)}")
        stacked = {place.key: bool(place.at) for place in places.values()}
        files: Any = metadata.storage_data
        boxes: dict[tuple[str, tuple[int, ...]], list[Box]] = defaultdict(list)
        self.archives: dict[str, list[Archive]] = defaultdict(list)  # by file
        for index, info in files.items():
            if index.fqn not in stored or index.offset is None:
                continue
            tensor = stored[index.fqn]
            shape = next(tuple(chunk.sizes) for chunk in tensor.chunks if chunk.offsets == index.offset)
            archive = Archive(info.relative_path, info.offset, info.length, tensor.properties.dtype, shape)
            self.archives[archive.file].append(archive)
            if index.fqn not in stacked:  # the optimizer's
                continue
            if not stacked[index.fqn]:
                boxes[index.fqn, ()].append(_box(archive, tuple(index.offset), None))
                continue
            for at in range(index.offset[0], index.offset[0] + shape[0]):
                boxes[index.fqn, (at,)].append(_box(archive, tuple(index.offset), at))
        self._boxes = {weight.name: boxes[places[weight.name].key, places[weight.name].at] for weight in table}

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._weight)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return self._weight[name][0].hf[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        return self._boxes[self._weight[name][0].name][0].archive.dtype

    def where(self, name: str) -> str:
        """Return the files of one tensor."""
        boxes = self._boxes[self._weight[name][0].name]
        return ", ".join(dict.fromkeys(str(self.folder / STATE / box.archive.file) for box in boxes))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows of one tensor.

        Raises:
            CheckpointError: a value is NaN or infinite, or a file is damaged.
        """
        weight, part = self._weight[name]
        pieces = [self._stored_rows(weight, *each) for each in self._where(weight, part, start, stop)]
        rows = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if nonfinite({name: rows}):
            raise CheckpointError(
                f"{self.folder} has values that are not finite (NaN or infinity) in {weight.name} "
                f"({self.where(name)}); use another step"
            )
        return rows

    def _where(self, weight: Weight, part: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the rows of the parameter that make the rows [start, stop) of one of the folder's tensors."""
        pieces = list(weight.transform.order(weight.hf_rows, self._size))
        ends = list(accumulate(piece.stop - piece.start for piece in pieces))
        found: list[tuple[Piece, int]] = sorted(
            (piece, end) for piece, end in zip(pieces, ends, strict=True) if piece.part == part
        )
        for piece, end in found:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                yield first - piece.stop + end, last - piece.stop + end

    def _stored_rows(self, weight: Weight, start: int, stop: int) -> Tensor:
        """Read rows of a parameter, from all the boxes that hold some of them."""
        boxes = self._boxes[weight.name]
        rows = torch.empty((stop - start, *weight.shape[1:]), dtype=boxes[0].archive.dtype)
        filled = 0
        for box in boxes:
            first, last = max(start, box.row), min(stop, box.row + box.rows)
            if first < last:
                target = rows[first - start : last - start]
                for dim, (offset, size) in enumerate(box.columns, 1):
                    target = target.narrow(dim, offset, size)
                self._read_box(weight.name, box, first - box.row, target)
                filled += target.numel()
        if filled != rows.numel():
            raise CheckpointError(f"{self.folder} does not hold every value of {weight.name}; use another step")
        return rows

    def _read_box(self, name: str, box: Box, row: int, target: Tensor) -> None:
        """Read rows of a box from `row` on."""
        archive = box.archive
        read = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
        content: Any = read.view(-1).view(torch.uint8).numpy()
        try:
            file = self._file(archive.file)
            if archive not in self._values:
                self._values[archive] = find_values(file, archive.offset, archive.length, archive.dtype, archive.shape)
            skipped = (box.skipped + row * box.row_values) * archive.dtype.itemsize
            file.read_into(memoryview(content), self._values[archive] + skipped)
        except (StoredTensorError, EOFError, FileNotFoundError) as error:
            raise CheckpointError(
                f"{self.folder / STATE / archive.file} is damaged where {name} is ({error}); use another step"
            ) from None
        if read is not target:
            target.copy_(read)

    def _file(self, name: str) -> WeightFile:
        if name not in self._files:
            if Path(name).name != name:
                raise StoredTensorError(f"the metadata names the file {name!r}, which is not one of its own folder")
            self._files[name] = LocalFile(self.folder / STATE / name, once=True)
        return self._files[name]


def _box(archive: Archive, offsets: tuple[int, ...], index: int | None) -> Box:
    """Return what an archive holds of a parameter that is a stored tensor, or an index of its first dimension."""
    shape = archive.shape
    if index is not None:
        skipped, offsets, shape = (index - offsets[0]) * prod(shape[1:]), offsets[1:], shape[1:]
    else:
        skipped = 0
    if not shape:
        return Box(0, 1, (), skipped, archive)
    return Box(offsets[0], shape[0], tuple(zip(offsets[1:], shape[1:], strict=True)), skipped, archive)
