"""Fill a model from Hugging Face tensors, and export them again.

    source                    what it is
    SafetensorsFolder(path)   a Hugging Face folder
    RandomWeights(config, s)  new weights from a seed

`load_weights` fills what this rank holds of the model: its pipeline stages, its experts, its tensor slices. Every
tensor is read whole, one at a time, and sliced. `model.weight_table` says which tensors make which parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from model.canonical_names import canonical_name
from model.errors import WeightsError
from model.fp8_weights import first_values
from model.random_weights import RandomWeights
from model.safetensors_folder import SafetensorsFolder, some
from model.weight_table import hf_shapes, sizes, weights

if TYPE_CHECKING:
    from model.glmv import GlmvModel

__all__ = [
    "RandomWeights",
    "SafetensorsFolder",
    "WeightSource",
    "WeightsError",
    "export_tensors",
    "hf_shapes",
    "load_weights",
]


class WeightSource(Protocol):
    """A source of tensors by their Hugging Face names."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Tensor: ...


# --- import -----------------------------------------------------------------------------------------------------------


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
            raise WeightsError(f"the model's parameter {name} has no row in model/weight_table.py")
        if name in filled:
            raise WeightsError(f"the model holds {name} twice")
        weight = table[name]
        whole = weight.transform.to_megatron([source.tensor(part) for part in weight.hf], size)
        own = this_ranks_slice(whole, local, name, weight.transform.stacked)
        local.copy_(own)
        if name in first:
            first[name].copy_(own)
        filled.add(name)
    if _holds_whole_model() and (absent := [weight.name for weight in table.values() if weight.name not in filled]):
        raise WeightsError(f"the model lacks {some(absent)}, which the weights hold")


def check_names_and_shapes(source: WeightSource, expected: dict[str, tuple[int, ...]]) -> None:
    """Check that `source` holds exactly the tensors of `expected`, without reading their values.

    Raises:
        WeightsError: names are missing or unknown, or shapes differ.
    """
    names = set(source.names())
    problems = []
    if missing := [name for name in expected if name not in names]:
        problems.append(f"missing: {some(missing)}")
    if unknown := sorted(names - set(expected)):
        problems.append(f"unknown: {some(unknown)}")
    if wrong := [
        f"{name} is {list(source.shape(name))}, not {list(shape)}"
        for name, shape in expected.items()
        if name in names and source.shape(name) != shape
    ]:
        problems.append(f"of another shape: {some(wrong)}")
    if problems:
        raise WeightsError("the weights do not fit the model's config.json; tensors " + "; ".join(problems))


def local_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and expert biases that this rank holds, with their canonical names."""
    for name, parameter in model.named_parameters():
        yield canonical_name(model, name), parameter.data
    for name, buffer in model.named_buffers():
        if name.endswith(".expert_bias"):
            yield canonical_name(model, name), buffer


def this_ranks_slice(whole: Tensor, local: Tensor, name: str, stacked: int) -> Tensor:
    """Return the part of a tensor that tensor parallelism keeps on this rank.

    Replicated tensors (norms, perhaps the vision tower) are returned whole. Matrices that are stacked in one tensor are
    sliced one by one: rank 1 of 2 keeps the second half of the gate and the second half of the up projection.

    Args:
        whole: The whole tensor.
        local: The parameter of this rank, whose shape tells which dimension is split.
        name: The canonical name.
        stacked: Number of stacked matrices.

    Raises:
        WeightsError: the shapes do not fit each other.
    """
    if whole.shape == local.shape:
        return whole
    if ".experts." in name:
        ranks = parallel_state.get_expert_tensor_parallel_world_size()
        rank = parallel_state.get_expert_tensor_parallel_rank()
    else:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
    split = [dim for dim, (all_, own) in enumerate(zip(whole.shape, local.shape, strict=True)) if all_ != own]
    if len(split) != 1 or whole.shape[split[0]] != ranks * local.shape[split[0]]:
        raise WeightsError(
            f"{name} is {list(whole.shape)} in the weights, and {list(local.shape)} on one of {ranks} tensor ranks"
        )
    (dim,) = split
    matrices = whole.chunk(stacked, dim) if dim == 0 else [whole]
    return torch.cat([matrix.chunk(ranks, dim)[rank] for matrix in matrices], dim)


def _holds_whole_model() -> bool:
    """Return whether this rank has every layer and every expert, perhaps sliced."""
    return (
        parallel_state.get_pipeline_model_parallel_world_size() == 1
        and parallel_state.get_expert_model_parallel_world_size() == 1
    )


# --- export -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def export_tensors(model: GlmvModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the Hugging Face folder with its name, from a model that one process holds whole.

    Tensors keep the dtype of their parameters; expert biases are float32.

    Raises:
        WeightsError: a part of the model is missing or sliced.
    """
    config = model.glmv_config
    held = dict(local_tensors(model))
    size = sizes(config)
    for weight in weights(config):
        if weight.name not in held:
            raise WeightsError(f"this process does not hold {weight.name}: export from a whole model")
        parts = weight.transform.to_hf(held[weight.name], size)
        for (name, shape), part in zip(weight.hf.items(), parts, strict=True):
            if tuple(part.shape) != shape:
                raise WeightsError(f"{name} would be {list(part.shape)}, not {list(shape)}: export from a whole model")
            yield name, part
