"""Weights in FP8 with scales beside them, as plain weights.

    name                 scale                              scaled by
    X.weight_scale       float, [] or [1]                   tensor
    X.weight_scale       float, [rows] or [rows, 1]         row (output channel)
    X.weight_scale       float, [blocks down, blocks]       block
    X.weight_scale_inv   the same                           block; it is multiplied by, whatever its name says

The first three are those of compressed-tensors (GLM-4.5-Air-FP8), the last that of transformers' block FP8. What is
scaled is seen from the names alone, never from a list of modules in `config.json`: a scale may be in another file than
its tensor, and one that is not applied is silent garbage. Values are multiplied in float32 and then rounded to the
dtype of the folder's other weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from model.errors import WeightsError
from model.finite import nonfinite
from model.weights.folder import SafetensorsFolder
from model.weights.source import some

SUFFIXES = ("_scale", "_scale_inv")
# Scales of activations and of caches, which are no weights.
OF_ACTIVATIONS = ("input_scale", "output_scale", "q_scale", "k_scale", "v_scale")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DEFAULT_BLOCK = (128, 128)
CHUNK = 2**19  # values that are in memory as float32 at a time: a conversion counts only the rows that it asks for
EXPERT_BIAS = "e_score_correction_bias"  # float32 in a bfloat16 model


@dataclass(frozen=True)
class Scale:
    """How one tensor is scaled."""

    name: str  # of the tensor of scales
    kind: str  # tensor, channel or block
    matrix_rows: int  # rows of one matrix; a tensor may be many of them above each other
    scale_rows: int  # rows of scales per matrix


class ScaledFolder:
    """A folder in which FP8 tensors are multiplied with their scales, and the scales are no tensors of their own.

    Attributes:
        unused: Scales of activations, which no row uses.

    Args:
        folder: The folder.
        block: Rows and columns of a block.

    Raises:
        WeightsError: An FP8 tensor has no scale, a scale has no FP8 tensor, or their shapes do not fit.
    """

    def __init__(self, folder: SafetensorsFolder, block: tuple[int, int] = DEFAULT_BLOCK) -> None:
        self.folder, self.block = folder, block
        self.unused = [name for name in folder.names() if name.rpartition(".")[2] in OF_ACTIVATIONS]
        names = [name for name in folder.names() if name.rpartition(".")[2] not in OF_ACTIVATIONS]
        scale_names = {base: name for name in names if (base := _base(name))}
        self._names = [name for name in names if not _base(name)]
        float8 = [name for name in self._names if folder.dtype(name) in FLOAT8]
        if bare := [name for name in float8 if name not in scale_names]:
            raise WeightsError(f"{folder.folder}: tensors in FP8 without a scale: {some(bare)}: a file is missing")
        if lost := sorted(scale_names[name] for name in scale_names.keys() - set(float8)):
            raise WeightsError(f"{folder.folder}: scales without a tensor in FP8: {some(lost)}: a file is missing")
        self._scales = {name: self._scale(name, scale_names[name]) for name in float8}
        plain = {folder.dtype(name) for name in self._names if name not in float8 and not name.endswith(EXPERT_BIAS)}
        self._dtype = torch.bfloat16 if plain <= {torch.bfloat16} else torch.float32

    @property
    def kinds(self) -> Mapping[str, int]:
        """Number of scaled tensors by what has a scale: tensor, channel or block."""
        kinds = [scale.kind for scale in self._scales.values()]
        return {kind: kinds.count(kind) for kind in ("tensor", "channel", "block") if kind in kinds}

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return self.folder.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that one tensor has after scaling."""
        return self._dtype if name in self._scales else self.folder.dtype(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor. Raises WeightsError if a value or a scale is not finite."""
        if name not in self._scales:
            return self.folder.rows(name, start, stop)
        shape = self.shape(name)[1:]
        product = torch.empty((stop - start, *shape), dtype=self._dtype)
        step = max(1, CHUNK // max(1, prod(shape)))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values = self.folder.unchecked_rows(name, first, last).float()
            product[first - start : last - start] = values.mul_(self._factors(name, first, last))
        if nonfinite({name: product}):
            raise WeightsError(
                f"{self.folder.folder}: tensor {name} has values or scales that are not finite: these weights are "
                "damaged; copy or download them again"
            )
        return product

    def where(self, name: str) -> str:
        """Return where one tensor comes from."""
        return self.folder.where(name)

    def _factors(self, name: str, start: int, stop: int) -> Tensor:
        """Return what rows [start, stop) are multiplied with, broadcastable to them."""
        scale = self._scales[name]
        if scale.kind == "tensor":
            return self.folder.unchecked_tensor(scale.name).float().reshape(1)
        if scale.kind == "channel":
            channels = self.folder.unchecked_rows(scale.name, start, stop).float()
            return channels.reshape(-1, *[1] * (len(self.shape(name)) - 1))
        row = torch.arange(start, stop)
        matrix, inside = row // scale.matrix_rows, row % scale.matrix_rows
        of_row = matrix * scale.scale_rows + inside // self.block[0]
        first, last = int(of_row[0]), int(of_row[-1])
        grid = self.folder.unchecked_rows(scale.name, first, last + 1).float()
        of_value = grid.repeat_interleave(self.block[1], dim=1)[:, : self.shape(name)[1]]
        return of_value[of_row - first]

    def _scale(self, name: str, scale_name: str) -> Scale:
        shape, scale = self.folder.shape(name), self.folder.shape(scale_name)
        matrices, matrix_rows = self.folder.matrices(name)
        if not self.folder.dtype(scale_name).is_floating_point:
            raise WeightsError(f"{self.folder.folder}: {scale_name} is stored as {self.folder.dtype(scale_name)}")
        scale_rows = ceil(matrix_rows / self.block[0])
        blocks = (matrices * scale_rows, ceil(shape[1] / self.block[1])) if len(shape) == 2 else None
        kind = "block" if scale == blocks else ""
        if not scale_name.endswith("_inv") and matrices == 1:
            if scale in ((), (1,)):
                kind = "tensor"
            elif scale in (shape[:1], (shape[0], 1)):
                kind = "channel"
        if not kind:
            raise WeightsError(
                f"{self.folder.folder}: {scale_name} is {list(scale)}, which fits neither the tensor, nor the rows, "
                f"nor blocks of {self.block[0]}x{self.block[1]} of {name}, {list(shape)}"
            )
        return Scale(scale_name, kind, matrix_rows, scale_rows)


def _base(name: str) -> str:
    """Return the name of the tensor that a scale belongs to; empty if `name` is no scale."""
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), "")
