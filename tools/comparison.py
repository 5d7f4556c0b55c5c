"""Compare the weights and files of two models.

Tensors are read a block of rows at a time, so that two models of any size are compared in little memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import HF_FILES, find_checkpoint, is_checkpoint
from model.config import GlmvConfig
from model.hf_config import CONFIG_FILE, with_one_rope_spelling
from model.weights.folder import SafetensorsFolder
from model.weights.formats.opened import open_folder
from model.weights.source import WeightSource, rows_of
from streaming.checkpoint_weights import CheckpointWeights
from tools.hf_output import HF_FILE_NAMES, ConvertError, progress_bar
from training.lora_base import refuse_adapters

BLOCK_BYTES = 2**23  # of rows in memory at a time; differences are computed in float64 and take more


@dataclass(frozen=True)
class TensorDifference:
    """How a tensor differs between two models."""

    name: str
    what: str  # in words
    largest: float | None  # largest absolute difference; None where values cannot be compared

    @property
    def order(self) -> float:
        """What to sort by: what cannot be compared, or is not a number, comes first."""
        return -math.inf if self.largest is None or math.isnan(self.largest) else -self.largest


class Side:
    """The weights of a Hugging Face folder or of a checkpoint, by Hugging Face names, and the files beside them.

    Raises:
        CheckpointError: A checkpoint is damaged, or holds adapters alone.
        WeightsError: A folder has no readable weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = self.files = path
        self.source: WeightSource
        if is_checkpoint(path):
            self.path = find_checkpoint(path)
            refuse_adapters(self.path)
            self.files = self.path / HF_FILES
            self.source = CheckpointWeights(self.path, GlmvConfig.from_hf(self.files))
        else:
            self.source = SafetensorsFolder(path)
        self.names = set(self.source.names())

    def read_as_model(self) -> None:
        """Take a folder's tensors as the model's: FP8 with its scales, fused experts one by one."""
        if self.path == self.files:
            self.source = open_folder(self.path).source
            self.names = set(self.source.names())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows, whatever their values where that is possible."""
        if isinstance(self.source, SafetensorsFolder):
            scalar = not self.source.shape(name)
            return self.source.unchecked_tensor(name)[None] if scalar else self.source.unchecked_rows(name, start, stop)
        return self.source.rows(name, start, stop)


def open_sides(path_a: Path, path_b: Path) -> tuple[Side, Side]:
    """Open two models: as they are stored if they have the same names, else as the model's tensors. Raises as Side."""
    a, b = Side(path_a), Side(path_b)
    if a.names != b.names:
        a.read_as_model()
        b.read_as_model()
    return a, b


# --- tensors ----------------------------------------------------------------------------------------------------------


def compare_tensors(a: Side, b: Side) -> list[TensorDifference]:
    """Return the tensors that differ, the largest difference first. Tensors are compared bit by bit."""
    names = sorted(a.names | b.names)
    found = []
    with progress_bar("comparing tensors", len(names)) as progress:
        for name in names:
            if difference := _compare_tensor(name, a, b):
                found.append(difference)
            progress.advance(progress.task_ids[0])
    return sorted(found, key=lambda difference: difference.order)


def _compare_tensor(name: str, a: Side, b: Side) -> TensorDifference | None:
    if not (name in a.names and name in b.names):
        return TensorDifference(name, f"is only in {(a if name in a.names else b).path}", None)
    shape, dtypes = a.source.shape(name), (a.source.dtype(name), b.source.dtype(name))
    if shape != b.source.shape(name):
        return TensorDifference(name, f"is {list(shape)} and {list(b.source.shape(name))}", None)
    largest, differ = 0.0, 0
    step = rows_of(BLOCK_BYTES, shape, torch.float32)
    rows = shape[0] if shape else 1
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        count, difference = _difference(a.rows(name, start, stop), b.rows(name, start, stop))
        differ, largest = differ + count, _larger(largest, difference)
    values = math.prod(shape)
    if dtypes[0] != dtypes[1]:
        kinds = " and ".join(str(dtype)[6:] for dtype in dtypes)
        return TensorDifference(name, f"is {kinds}; {differ:,} of {values:,} values differ", largest)
    return TensorDifference(name, f"{differ:,} of {values:,} values differ", largest) if differ else None


def _difference(x: Tensor, y: Tensor) -> tuple[int, float]:
    """Return how many values differ, bit by bit, and the largest absolute difference. Of two dtypes, by value."""
    if x.dtype == y.dtype:
        unequal = (x.contiguous().view(torch.uint8) != y.contiguous().view(torch.uint8)).view(-1, x.element_size())
        count = int(unequal.any(-1).sum())
    else:
        count = int((x.double() != y.double()).sum())
    return count, (x.double() - y.double()).abs().max().item() if count else 0.0


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


# --- files ------------------------------------------------------------------------------------------------------------


def compare_files(dir_a: Path, dir_b: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the differences of the files beside the weights: what differs, and what it is in each folder.

    JSON is compared by content, without the version of transformers that wrote it and with both spellings of rotary
    embedding taken as equal; other files byte by byte.

    Raises:
        ConvertError: A file is not JSON.
    """
    for name in dict.fromkeys(HF_FILE_NAMES):
        yield from _compare_file(name, dir_a / name, dir_b / name)


def _compare_file(name: str, a: Path, b: Path) -> Iterator[tuple[str, str, str]]:
    if not (a.is_file() and b.is_file()):
        if a.is_file() or b.is_file():
            yield name, "present" if a.is_file() else "missing", "present" if b.is_file() else "missing"
    elif name.endswith(".json"):
        flat_a, flat_b = (dict(_flatten(_read_json(path))) for path in (a, b))
        for key in sorted({*flat_a, *flat_b} - {"transformers_version"}):
            if flat_a.get(key) != flat_b.get(key):
                yield f"{name}: {key}", str(flat_a.get(key, "absent")), str(flat_b.get(key, "absent"))
    elif a.read_bytes() != b.read_bytes():
        yield name, "bytes differ", "bytes differ"


def _read_json(path: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConvertError(f"{path} is not valid JSON: {error}") from None
    return with_one_rope_spelling(content) if path.name == CONFIG_FILE else content


def _flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted keys of nested objects with their values as JSON, so that 1, true and "1" differ."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, json.dumps(content, sort_keys=True)
