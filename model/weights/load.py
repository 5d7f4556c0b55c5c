"""Fill a model from Hugging Face tensors.

    source                    what it is
    SafetensorsFolder(path)   a Hugging Face folder
    RandomWeights(config, s)  new weights from a seed

`load_weights` fills what this rank holds of the model: its pipeline stages, its experts, its tensor slices. It reads
no other rows; of a matrix whose columns are split it reads whole rows, a block at a time. `model.weights.table` says
which tensors make which parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from model.canonical_names import canonical_name
from model.errors import WeightsError
from model.fp8_weights import first_values
from model.weights.folder import SafetensorsFolder
from model.weights.random_weights import RandomWeights
from model.weights.source import WeightSource, check_names_and_shapes, rows_of, some
from model.weights.table import Weight, hf_shapes, sizes, weights

if TYPE_CHECKING:
    from model.glmv import GlmvModel

__all__ = [
    "RandomWeights",
    "SafetensorsFolder",
    "WeightSource",
    "WeightsError",
    "check_names_and_shapes",
    "hf_shapes",
    "load_weights",
]

BLOCK_BYTES = 2**26  # of rows of which only some columns are kept


@torch.no_grad()
def load_weights(model_chunks: Sequence[GlmvModel], source: WeightSource) -> None:
    """Fill every parameter and expert bias that this rank holds of a model.

    Args:
        model_chunks: What this rank holds, one chunk per virtual pipeline stage.
        source: The weights. Values are cast to the dtype of their parameter; expert biases stay float32.

    Raises:
        WeightsError: the source does not hold exactly the model's tensors with the right shapes, a value is not
            finite, or the model and the table of weights differ.
    """
    config = model_chunks[0].glmv_config
    check_names_and_shapes(source, hf_shapes(config))
    table = {weight.name: weight for weight in weights(config)}
    size = sizes(config)
    filled: set[str] = set()
    first = {canonical_name(model, name): copy for model in model_chunks for name, copy in first_values(model)}
    for name, local in (named for model in model_chunks for named in local_tensors(model)):
        if name not in table:
            raise WeightsError(f"the model's parameter {name} has no row in model/weights/table.py")
        if name in filled:
            raise WeightsError(f"the model holds {name} twice")
        own = read_part(source, table[name], this_ranks_part(table[name], tuple(local.shape)), size)
        local.copy_(own)
        if name in first:
            first[name].copy_(own)
        filled.add(name)
    if _holds_whole_model() and (absent := [weight.name for weight in table.values() if weight.name not in filled]):
        raise WeightsError(f"the model lacks {some(absent)}, which the weights hold")


def local_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and expert biases that this rank holds, with their canonical names."""
    for name, parameter in model.named_parameters():
        yield canonical_name(model, name), parameter.data
    for name, buffer in model.named_buffers():
        if name.endswith(".expert_bias"):
            yield canonical_name(model, name), buffer


class Part(NamedTuple):
    """What tensor parallelism keeps of a matrix on one rank."""

    rows: tuple[tuple[int, int], ...]  # [start, stop), one per stacked matrix
    columns: slice

    def of(self, whole: Tensor) -> Tensor:
        """Return this part of a whole tensor."""
        rows = torch.cat([whole[start:stop] for start, stop in self.rows])
        return rows if rows.dim() == 1 else rows[:, self.columns]

    def put(self, whole: Tensor, own: Tensor) -> None:
        """Write this part into its place in the whole tensor."""
        done = 0
        for start, stop in self.rows:
            place = whole[start:stop] if whole.dim() == 1 else whole[start:stop, self.columns]
            place.copy_(own[done : done + stop - start])
            done += stop - start


def this_ranks_part(weight: Weight, local_shape: tuple[int, ...]) -> Part:
    """Return the part of a parameter that tensor parallelism keeps on this rank, as `part_of`."""
    group = tensor_group(weight)
    return part_of(weight, local_shape, group.rank(), group.size())


def tensor_group(weight: Weight) -> ProcessGroup:
    """Return the tensor ranks that may share a parameter."""
    if ".experts." in weight.name:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def part_of(weight: Weight, local_shape: tuple[int, ...], rank: int, ranks: int) -> Part:
    """Return the part of a parameter that tensor parallelism keeps on a rank.

    Replicated tensors (norms, perhaps the vision tower) are kept whole. Matrices that are stacked in one tensor are
    sliced one by one: rank 1 of 2 keeps the second half of the gate and the second half of the up projection.

    Args:
        weight: The parameter.
        local_shape: Shape of the parameter of one rank, which tells which dimension is split.
        rank: Of the tensor ranks.
        ranks: Their number.

    Raises:
        WeightsError: the shapes do not fit each other.
    """
    shape = weight.shape
    if shape == local_shape:
        return Part(((0, shape[0]),), slice(None))
    split = [dim for dim, (all_, own) in enumerate(zip(shape, local_shape, strict=True)) if all_ != own]
    if len(split) != 1 or split[0] > 1 or shape[split[0]] != ranks * local_shape[split[0]]:
        raise WeightsError(
            f"{weight.name} is {list(shape)} in the weights, and {list(local_shape)} on one of {ranks} tensor ranks"
        )
    if split[0] == 1:
        return Part(((0, shape[0]),), slice(rank * local_shape[1], (rank + 1) * local_shape[1]))
    height, own = (rows // weight.transform.stacked for rows in (shape[0], local_shape[0]))
    starts = [matrix * height + rank * own for matrix in range(weight.transform.stacked)]
    return Part(tuple((start, start + own) for start in starts), slice(None))


def read_part(source: WeightSource, weight: Weight, part: Part, size: Mapping[str, int]) -> Tensor:
    """Read a part of a parameter. Of other columns, one block of rows at a time is in memory."""
    names = list(weight.hf)
    read = []
    for piece in (piece for start, stop in part.rows for piece in weight.pieces(size, start, stop)):
        name = names[piece.part]
        step = rows_of(BLOCK_BYTES, source.shape(name), source.dtype(name))
        if part.columns == slice(None):
            read.append(source.rows(name, piece.start, piece.stop))
            continue
        read += [
            source.rows(name, start, min(start + step, piece.stop))[:, part.columns].clone()
            for start in range(piece.start, piece.stop, step)
        ]
    return torch.cat(read) if len(read) > 1 else read[0]


def _holds_whole_model() -> bool:
    """Return whether this rank has every layer and every expert, perhaps sliced."""
    return (
        parallel_state.get_pipeline_model_parallel_world_size() == 1
        and parallel_state.get_expert_model_parallel_world_size() == 1
    )
