"""The weights of a model in any layout as a Hugging Face folder has them, one parameter after another.

No process ever holds the model. Each parameter has one owner, to which the tensor ranks that share it send their
slices; the owner turns it into the tensors of the folder and hands them on. Owners are spread over all processes:

    a parameter with number n in the table, held by R replicas of T tensor ranks (data, context and expert parallelism
    make replicas): tensor rank n / R mod T of replica n mod R owns it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from model.errors import WeightsError
from model.lora_layers import Adapter
from model.lora_weights import Factors, adapted_weights, merged
from model.weights.load import local_tensors, part_of, tensor_group
from model.weights.table import Weight, sizes, weights

if TYPE_CHECKING:
    from model.glmv import GlmvModel

NamedTensor = tuple[str, Tensor]


@dataclass(frozen=True)
class Held:
    """A parameter of which this process has a part to give.

    Attributes:
        weight: The row of the table.
        local: This rank's part.
        adapters: LoRA adapters of this rank's part.
        group: The tensor ranks that share it.
        owner: Rank in `group` of the owner.
    """

    weight: Weight
    local: Tensor
    adapters: list[Adapter]
    group: dist.ProcessGroup
    owner: int

    @property
    def is_own(self) -> bool:
        """Whether this process is the owner."""
        return self.group.rank() == self.owner


def held_parameters(model_chunks: Sequence[GlmvModel]) -> dict[int, Held]:
    """Return what this process gives to a stream, by numbers in the table.

    Args:
        model_chunks: What this rank holds of the model.

    Raises:
        WeightsError: A weight is kept in FP8.
    """
    local = {name: tensor for chunk in model_chunks for name, tensor in local_tensors(chunk)}
    adapters = {name: found for chunk in model_chunks if chunk.lora for name, _, found in adapted_weights(chunk)}
    held = {}
    for number, weight in enumerate(weights(model_chunks[0].glmv_config)):
        if weight.name not in local:
            continue
        if is_float8tensor(local[weight.name]):
            raise WeightsError(
                f"{weight.name} is kept in FP8, whose exact values only the optimizer has: set fp8.param_gather=false"
            )
        rank, replicas = _replica(weight)
        if number % replicas == rank:
            group = tensor_group(weight)
            owner = number // replicas % group.size()
            held[number] = Held(weight, local[weight.name], adapters.get(weight.name, []), group, owner)
    return held


def _replica(weight: Weight) -> tuple[int, int]:
    """Return which of the replicas of a parameter this rank belongs to, and their number."""
    if ".experts." in weight.name:
        return parallel_state.get_expert_data_parallel_rank(), parallel_state.get_expert_data_parallel_world_size()
    return (
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )


@torch.no_grad()
def stream_tensors(model_chunks: Sequence[GlmvModel], *, to_all: bool = False) -> Iterator[NamedTensor]:
    """Yield the tensors of the Hugging Face folder, with adapters merged. Collective: every process takes them all.

    A tensor is valid until the next one is taken, and may share memory with the model: copy what is to be kept. Beside
    the model, a process needs memory for the largest parameter and a tensor rank's slice of it.

    Args:
        model_chunks: What this rank holds of the model. Its weights must not be out of date (`synchronize_weights`).
        to_all: Whether every process gets every tensor, broadcast by its owner. Otherwise it gets those that it owns.

    Raises:
        WeightsError: A weight is kept in FP8.
    """
    config = model_chunks[0].glmv_config
    size = sizes(config)
    held = held_parameters(model_chunks)
    owners = _owners(held) if to_all else {}
    for number, weight in enumerate(weights(config)):
        tensors = _tensors(held[number], size) if number in held else None
        if to_all:
            tensors = _broadcast(weight, tensors, *owners[number])
        if tensors is not None:
            yield from zip(weight.hf, tensors, strict=True)
            del tensors  # before the next ones are made


def _owners(held: dict[int, Held]) -> dict[int, tuple[int, torch.dtype]]:
    """Return the owner of every parameter, and its dtype. Collective."""
    own = {number: (dist.get_rank(), each.local.dtype) for number, each in held.items() if each.is_own}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {number: owner for owners in everyone for number, owner in owners.items()}


def _broadcast(weight: Weight, tensors: list[Tensor] | None, owner: int, dtype: torch.dtype) -> list[Tensor]:
    """Return the tensors of a parameter on every process. Collective."""
    if tensors is None:
        device = torch.cuda.current_device()
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape in weight.hf.values()]
    if dist.get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=owner)
    return tensors


# --- one parameter ----------------------------------------------------------------------------------------------------


def _tensors(held: Held, size: dict[str, int]) -> list[Tensor] | None:
    """Return a parameter as tensors of the folder on its owner; None on the ranks that send their slices to it."""
    weight, ranks = held.weight, held.group.size()
    parts = [part_of(weight, tuple(held.local.shape), rank, ranks) for rank in range(ranks)]
    whole = _collected(held, held.local, weight.shape, lambda whole, rank, part: parts[rank].put(whole, part))
    factors = [_factors(held, adapter) for adapter in held.adapters]
    if whole is None:
        return None
    if factors:
        whole = merged(weight, whole, [one for one in factors if one], size)
    pieces = list(weight.transform.order(weight.hf_rows, size))
    if len(pieces) == len(weight.hf):  # the tensors are one above the other
        return list(whole.split(weight.hf_rows))
    return weight.transform.to_hf(whole, weight.hf_rows, size)


def _factors(held: Held, adapter: Adapter) -> Factors | None:
    """Return an adapter with whole factors on the owner of its matrix, None on other ranks."""
    whole = []
    for name in adapter.factors:
        local, dim = adapter.get_parameter(name), adapter.split_dim(name)
        shape = list(local.shape)
        if dim is not None:
            shape[dim] *= held.group.size()
        whole.append(_collected(held, local, tuple(shape), partial(_put_chunk, dim or 0)))
    a, *blocks = whole
    return (
        None if a is None else Factors(adapter.site, adapter.scale, a, torch.cat([b for b in blocks if b is not None]))
    )


def _put_chunk(dim: int, whole: Tensor, rank: int, chunk: Tensor) -> None:
    whole.narrow(dim, rank * chunk.size(dim), chunk.size(dim)).copy_(chunk)


def _collected(
    held: Held, local: Tensor, shape: tuple[int, ...], put: Callable[[Tensor, int, Tensor], None]
) -> Tensor | None:
    """Return a whole tensor on the owner, and None on the ranks that send their parts to it.

    Args:
        held: Names the owner and the ranks.
        local: This rank's part.
        shape: Of the whole. If it is that of the part, nothing is sent.
        put: Writes the part of a rank into the whole.
    """
    if local.shape == shape:
        return local if held.is_own else None
    if not held.is_own:
        dist.send(local.contiguous(), dist.get_global_rank(held.group, held.owner), group=held.group)
        return None
    whole, received = local.new_empty(shape), torch.empty_like(local, memory_format=torch.contiguous_format)
    for rank in range(held.group.size()):
        if rank != held.owner:
            dist.recv(received, dist.get_global_rank(held.group, rank), group=held.group)
        put(whole, rank, local if rank == held.owner else received)
    return whole
