"""Describe what a rank holds of a model as a table: parameters, how they are split and marked, and how they are saved.

`make te-tables` writes the golden tables in golden/, which must be read before they are committed.

Rows that differ only in the numbers of layers or experts are folded into one, with the numbers as a range:

    language_model.decoder.layers.{1-45}.mlp.experts.linear_fc1.weight{0-127}
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from model.glmv import GlmvModel
from model.installed import transformer_engine_version
from model.megatron_versions import VERSION

TRANSFORMER_ENGINE = tuple(int(number) for number in transformer_engine_version().split(".")[:2])
GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Row:
    """One parameter (or expert bias) of a rank."""

    parameter: str  # its name
    shape: str  # of what this rank holds
    dtype: str
    split: str  # dimension that tensor parallelism splits, and `x2` where two matrices in it are split one by one
    marks: str  # attributes that megatron-core's gradient reduction reads
    key: str  # in a checkpoint
    global_shape: str  # in a checkpoint
    offsets: str  # where this rank's part begins in a checkpoint; gate and up projection are two parts


def shards(model: GlmvModel) -> dict[str, list[ShardedTensor]]:
    """Return what a rank declares for a checkpoint, by parameter and expert bias.

    It is one tensor, or two for the first matrix of a gated MLP. megatron-core's `_extra_state` is not saved
    and not returned.
    """
    state = model.sharded_state_dict()
    return {
        name: sharded.build() if isinstance(sharded, ShardedTensorFactory) else [sharded]
        for name, sharded in state.items()
        if not isinstance(sharded, ShardedObject)
    }


def rows(model: GlmvModel, shards: dict[str, list[ShardedTensor]]) -> Iterator[Row]:
    tensors = dict(model.named_parameters())
    for name, parts in shards.items():
        tensor = tensors.get(name, parts[0].data)
        yield Row(
            parameter=name,
            shape=dimensions(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            split=_split(tensor),
            marks=" ".join(_marks(tensor)),
            key=parts[0].key,
            global_shape=dimensions(parts[0].global_shape),
            offsets=" ".join(dimensions(part.global_offset) for part in parts),
        )


def dimensions(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))


def _split(tensor: Any) -> str:
    if not getattr(tensor, "tensor_model_parallel", False):
        return ""
    return f"{tensor.partition_dim}" + (f" x{tensor.partition_stride}" if tensor.partition_stride > 1 else "")


def _marks(tensor: Any) -> Iterator[str]:
    for attribute in ("sequence_parallel", "average_gradients_across_tp_domain"):
        if getattr(tensor, attribute, False):
            yield attribute
    if not getattr(tensor, "allreduce", True):
        yield "expert"


# --- folding ----------------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"(?<=layers\.)\d+|(?<=local_experts\.)\d+|(?<=\.weight)\d+")


def folded(table: Iterable[Row]) -> list[Row]:
    """Fold the rows that differ only in numbers into one each, in the order of their first rows.

    In keys and offsets `#` stands for the number of the parameter's own layer or expert.
    """
    groups: dict[Row, list[list[int]]] = {}
    for row in table:
        numbers = [int(number) for number in NUMBER.findall(row.parameter)]
        pattern = replace(
            row,
            parameter=NUMBER.sub("#", row.parameter),
            key=row.key.replace(f"layers.{numbers[0]}.", "layers.#.") if numbers else row.key,
            offsets=_relative_offsets(row, numbers),
        )
        groups.setdefault(pattern, []).append(numbers)
    return [_with_ranges(pattern, numbers) for pattern, numbers in groups.items()]


def _relative_offsets(row: Row, numbers: list[int]) -> str:
    """Return the offsets, relative to the layer or expert where these are stacked: `#+64` in the second half of 128."""
    if row.global_shape.count("x") == row.shape.count("x"):
        return row.offsets
    parts = [part.split("x", 1) for part in row.offsets.split()]
    return " ".join(f"#{int(stacked) - numbers[-1]:+}x{rest}" for stacked, rest in parts)


def _with_ranges(pattern: Row, numbers: list[list[int]]) -> Row:
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    assert len(numbers) == prod(map(len, columns)), f"{pattern.parameter}: not every expert in every layer"
    ranges = iter(columns)
    return replace(pattern, parameter=re.sub("#", lambda _: _range(next(ranges)), pattern.parameter))


def _range(numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    assert len(numbers) == last - first + 1, f"there are gaps in {numbers}"
    return str(first) if first == last else f"{{{first}-{last}}}"


# --- files ------------------------------------------------------------------------------------------------------------


def read(name: str) -> list[Row]:
    with (GOLDEN / f"{name}.csv").open(newline="") as file:
        return [_as_installed(Row(**row)) for row in csv.DictReader(file)]


def _as_installed(row: Row) -> Row:
    """Return a row as the installed versions have it. The files hold that of megatron-core 0.16, Engine below 2.13.

    Under expert parallelism these say that dimension 0 of the second matrix is split. Later ones say 1, which is right.
    Nothing reads it.
    """
    is_exception = ".experts.linear_fc2." in row.parameter and row.split == "0"
    is_new = VERSION >= (0, 17) or TRANSFORMER_ENGINE >= (2, 13)
    return replace(row, split="1") if is_exception and is_new else row


def write(name: str, table: Iterable[Row]) -> None:
    with (GOLDEN / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows(astuple(row) for row in table)
