"""Read rows of the parameters in a checkpoint, saved at any layout.

A parameter is in one file or in many: each rank of a layout has written its part, an archive of torch.save.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.checkpoint import STATE
from model.checkpoint_metadata import read_metadata
from model.errors import CheckpointError
from model.finite import nonfinite
from model.weights.files import LocalFile, WeightFile
from model.weights.source import some
from streaming.frames import Archive
from streaming.names import Place
from streaming.stored_tensors import StoredTensorError, find_values


class Wanted(NamedTuple):
    """What a checkpoint should have of a parameter."""

    shape: tuple[int, ...]
    place: Place


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


class StoredParameters:
    """The parameters of a step folder.

    Args:
        folder: The step folder.
        parameters: The parameters by name.
        described: What describes them, for the error if the folder has others.

    Raises:
        CheckpointError: A parameter is missing or has another shape, or the folder is damaged or not safe to read.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, Wanted], described: str) -> None:
        self.folder = folder
        self.archives: dict[str, list[Archive]] = defaultdict(list)  # by file, of what else is stored too
        self._parameters = parameters
        self._files: dict[str, WeightFile] = {}
        self._values: dict[Archive, int] = {}  # where the values of an archive begin in its file
        metadata = read_metadata(folder / STATE)
        self.keys: frozenset[str] = frozenset(metadata.state_dict_metadata)  # of all that is stored
        self._check(metadata.state_dict_metadata, described)
        self._boxes = self._find_boxes(metadata)
        if missing := [name for name, boxes in self._boxes.items() if not boxes]:
            raise CheckpointError(f"{folder} does not hold {some(missing)}; use another step")

    def _check(self, stored: Any, described: str) -> None:
        """Compare names and shapes with what is stored."""
        if missing := [name for name, (_, place) in self._parameters.items() if place.key not in stored]:
            raise CheckpointError(f"{self.folder} does not hold {some(missing)}: it is not what {described} describes")
        if wrong := [
            f"{name} is {list(stored[place.key].size)}, not {[*place.size, *shape]}"
            for name, (shape, place) in self._parameters.items()
            if tuple(stored[place.key].size) != (*place.size, *shape)
        ]:
            raise CheckpointError(f"{self.folder} has other shapes than {described} describes: {some(wrong)}")

    def _find_boxes(self, metadata: Any) -> dict[str, list[Box]]:
        """Return the boxes of every parameter."""
        stored, files = metadata.state_dict_metadata, metadata.storage_data
        stacked = {place.key: bool(place.at) for _, place in self._parameters.values()}
        boxes: dict[tuple[str, tuple[int, ...]], list[Box]] = defaultdict(list)
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
        return {name: boxes[place.key, place.at] for name, (_, place) in self._parameters.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a parameter."""
        return self._boxes[name][0].archive.dtype

    def where(self, name: str) -> str:
        """Return the files of a parameter."""
        return ", ".join(dict.fromkeys(str(self.folder / STATE / box.archive.file) for box in self._boxes[name]))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows of a parameter, from all the boxes that hold some of them.

        Raises:
            CheckpointError: A value is NaN or infinite, or a file is damaged.
        """
        shape, boxes = self._parameters[name].shape, self._boxes[name]
        rows = torch.empty((stop - start, *shape[1:]), dtype=boxes[0].archive.dtype)
        filled = 0
        for box in boxes:
            first, last = max(start, box.row), min(stop, box.row + box.rows)
            if first < last:
                target = rows[first - start : last - start]
                for dim, (offset, size) in enumerate(box.columns, 1):
                    target = target.narrow(dim, offset, size)
                self._read_box(name, box, first - box.row, target)
                filled += target.numel()
        if filled != rows.numel():
            raise CheckpointError(f"{self.folder} does not hold every value of {name}; use another step")
        if nonfinite({name: rows}):
            raise CheckpointError(
                f"{self.folder} has values that are not finite (NaN or infinity) in {name} ({self.where(name)}); use "
                "another step"
            )
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
