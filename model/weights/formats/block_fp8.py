"""Plain weights as FP8 with a scale for each block of 128x128, in the form that vLLM, SGLang and transformers read.

    X.weight             float8_e4m3fn, [rows, columns]
    X.weight_scale_inv   float32, [ceil(rows / 128), ceil(columns / 128)]; it is multiplied by, whatever its name says

The scale of a block is its largest absolute value / 448, at least 1e-4 / 448, and its values are multiplied with
1 / scale in float32 and rounded to the nearest: `per_block_cast_to_fp8` of DeepGEMM and vLLM, bit for bit. The reverse
is `scales`.

Converted are the linear layers of the decoder: attention, dense MLP, routed and shared experts. Engines merge matrices
(query, key and value; gate and up; all experts; in SGLang also the shared expert with the routed ones) and need one
format for what is merged, with blocks that do not reach from one matrix into the next. So the attention and the MLP of
a layer are converted as a whole, and stay plain if one of their sizes is no multiple of 128.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from model.errors import WeightsError
from model.weights.formats.scales import CHUNK
from model.weights.source import WeightSource

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
SMALLEST_AMAX = 1e-4
SCALE = "_scale_inv"

LINEAR = re.compile(r"(model\.language_model\.layers\.\d+\.(?:self_attn|mlp))\..*proj\.weight")
STACKED = ".gate_up_proj"  # gate above up, in the folder of GLM-4.1V and in the engines' models
TOWER, DECODER = "model.visual", "model.language_model."


# --- what is converted ------------------------------------------------------------------------------------------------


def converted_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the names of the tensors of a model that become FP8."""
    return [
        name for names in _blocks(shapes).values() if all(_fits(each, shapes[each]) for each in names) for name in names
    ]


def plain_blocks(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the attentions and MLPs of the decoder that stay plain, because a size is no multiple of 128."""
    return [block for block, names in _blocks(shapes).items() if not all(_fits(each, shapes[each]) for each in names)]


def quantization_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return what config.json says about the weights of a model in FP8.

    transformers and SGLang take a name in the list for all modules below it; vLLM compares whole names, where gate and
    up projection are one module. The decoder of a dense model is `model.` in SGLang.
    """
    converted = set(converted_names(shapes))
    plain = [TOWER, *plain_blocks(shapes)]
    plain += [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) > 1 and name not in converted
    ]
    plain += [name.removesuffix(".gate_proj") + STACKED for name in plain if name.endswith(".gate_proj")]
    plain += [name.replace(DECODER, "model.") for name in plain if LINEAR.fullmatch(f"{name}.weight")]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": plain,  # as transformers calls it, and vLLM where there is no other
        "ignored_layers": plain,  # as vLLM and SGLang call it
    }


def _blocks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Return the linear layers of every attention and MLP of the decoder."""
    blocks: dict[str, list[str]] = {}
    for name in shapes:
        if found := LINEAR.fullmatch(name):
            blocks.setdefault(found[1], []).append(name)
    return blocks


def _fits(name: str, shape: tuple[int, ...]) -> bool:
    matrices = 2 if name.endswith(f"{STACKED}.weight") else 1
    return shape[0] % (matrices * BLOCK) == 0 and shape[1] % BLOCK == 0


# --- the tensors ------------------------------------------------------------------------------------------------------


class BlockQuantised:
    """A source of which some matrices are FP8, each followed by its scales. The others are as they are.

    Rows are read in blocks that begin at a multiple of 128, so any rows of a tensor have the same bits, however many
    are asked for at a time. Scales need all the rows of their blocks: a matrix is read twice, a few rows at a time.

    Attributes:
        made: Names of the tensors that are FP8 or scales, which have no other dtype.

    Args:
        source: Plain weights.
        names: The matrices to convert.
    """

    def __init__(self, source: WeightSource, names: Collection[str]) -> None:
        self.source = source
        self._names = set(names)
        self._matrix_of = {name + SCALE: name for name in names}
        self.made = self._names | self._matrix_of.keys()

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return [
            each for name in self.source.names() for each in ((name, name + SCALE) if name in self._names else (name,))
        ]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        if name in self._matrix_of:
            return tuple(ceil(size / BLOCK) for size in self.source.shape(self._matrix_of[name]))
        return self.source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        if name in self._matrix_of:
            return torch.float32
        return torch.float8_e4m3fn if name in self._names else self.source.dtype(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor. Raises WeightsError if a value of a matrix is not finite."""
        if name not in self.made:
            return self.source.rows(name, start, stop)
        made = torch.empty((stop - start, *self.shape(name)[1:]), dtype=self.dtype(name))
        if name in self._matrix_of:
            self._fill_scales(self._matrix_of[name], start, made)
        else:
            self._fill_values(name, start, made)
        return made

    def where(self, name: str) -> str:
        """Return where one tensor comes from."""
        return self.source.where(self._matrix_of.get(name, name))

    def _fill_values(self, name: str, start: int, made: Tensor) -> None:
        stop, columns = start + made.shape[0], made.shape[1]
        step = _rows_at_a_time(columns)
        for first in range(start // BLOCK * BLOCK, stop, step):
            blocks, scales = self._read_blocks(name, first, min(first + step, ceil(stop / BLOCK) * BLOCK))
            scaled = (blocks * (1.0 / scales)).view(-1, blocks.shape[2] * BLOCK)[:, :columns]
            low, high = max(first, start), min(first + step, stop)
            made[low - start : high - start] = scaled[low - first : high - first].to(torch.float8_e4m3fn)

    def _fill_scales(self, name: str, start: int, made: Tensor) -> None:
        stop = start + made.shape[0]
        step = _rows_at_a_time(self.source.shape(name)[1]) // BLOCK
        for first in range(start, stop, step):
            last = min(first + step, stop)
            _, scales = self._read_blocks(name, first * BLOCK, last * BLOCK)
            made[first - start : last - start] = scales[:, 0, :, 0]

    def _read_blocks(self, name: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return blocks of rows in float32, with zeros outside the matrix, and their scales.

        Returns:
            Blocks, [down, 128, across, 128], and scales, [down, 1, across, 1].
        """
        rows = self.source.rows(name, start, min(stop, self.source.shape(name)[0])).float()
        padded = pad(rows, (0, -rows.shape[1] % BLOCK, 0, -rows.shape[0] % BLOCK))
        blocks = padded.view(-1, BLOCK, padded.shape[1] // BLOCK, BLOCK)
        largest = blocks.abs().amax(dim=(1, 3), keepdim=True)
        if not torch.isfinite(largest).all():
            raise WeightsError(f"{self.where(name)}: tensor {name} has values that are not finite (NaN or infinity)")
        return blocks, largest.clamp(min=SMALLEST_AMAX) / LARGEST


def _rows_at_a_time(columns: int) -> int:
    """Return a multiple of 128 rows that are in memory as float32 at a time."""
    return max(1, CHUNK // columns // BLOCK) * BLOCK
