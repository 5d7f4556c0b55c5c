"""How a model is laid out over processes: the sizes, what they must divide, and the process groups."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from model.config import ConfigError, GlmvConfig


@dataclass
class ParallelConfig:
    """Sizes of the parallel dimensions; what is left of the world is data parallel.

    Routed experts are not split over tensor-parallel ranks (expert tensor parallelism is 1): a rank of a TP x EP layout
    holds whole experts. The vision tower and the adapter are replicated over tensor-parallel ranks.
    """

    tensor_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "expert_model_parallel_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name}={getattr(self, name)} must be at least 1")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "parallel.sequence_parallel=true splits the sequence over tensor-parallel ranks; set "
                "parallel.tensor_model_parallel_size above 1, or sequence_parallel=false"
            )

    def check(self, model: GlmvConfig, world_size: int, seq_length: int) -> None:
        """Refuse a layout that cannot be, or that megatron-core would run and get wrong.

        Raises:
            ConfigError: naming the option and what it must divide.
        """
        tp, ep = self.tensor_model_parallel_size, self.expert_model_parallel_size
        decoder = model.decoder
        if world_size % tp:
            raise ConfigError(f"parallel.tensor_model_parallel_size={tp} does not divide the {world_size} processes")
        if world_size % ep:
            raise ConfigError(f"parallel.expert_model_parallel_size={ep} does not divide the {world_size} processes")
        if not decoder.is_moe and ep > 1:
            raise ConfigError(f"parallel.expert_model_parallel_size={ep}: this model is dense; set it to 1")
        if decoder.is_moe and tp > 1 and not self.sequence_parallel:
            raise ConfigError(
                "a mixture of experts under tensor parallelism needs parallel.sequence_parallel=true: without it every "
                "tensor-parallel rank routes every token, and the experts' gradients are wrong"
            )
        divides = [("num_attention_heads", decoder.num_attention_heads), ("vocab_size", decoder.vocab_size),
                   ("num_key_value_heads", decoder.num_key_value_heads),
                   ("intermediate_size", decoder.intermediate_size)]  # fmt: skip
        if decoder.is_moe:
            divides += [("shared expert width", decoder.moe_intermediate_size * decoder.n_shared_experts)]
        for name, value in divides:
            if value % tp:
                raise ConfigError(
                    f"parallel.tensor_model_parallel_size={tp} does not divide the model's {name} {value}"
                )
        if decoder.is_moe and decoder.n_routed_experts % ep:
            raise ConfigError(
                f"parallel.expert_model_parallel_size={ep} does not divide the model's {decoder.n_routed_experts} "
                "experts"
            )
        if self.sequence_parallel and seq_length % tp:
            raise ConfigError(f"parallel.tensor_model_parallel_size={tp} does not divide train.seq_length={seq_length}")

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // self.tensor_model_parallel_size

    def data_parallel_rank(self, rank: int) -> int:
        """Of a process in the world. In megatron-core's order (tensor, expert, data) tensor-parallel ranks are
        neighbours."""
        return rank // self.tensor_model_parallel_size

    @property
    def transformer_fields(self) -> dict[str, object]:
        """This layout in the names of megatron-core's TransformerConfig."""
        return {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "expert_model_parallel_size": self.expert_model_parallel_size,
            "expert_tensor_parallel_size": 1,
            "sequence_parallel": self.sequence_parallel,
        }


def initialize_model_parallel(config: ParallelConfig, seed: int) -> None:
    """Make megatron-core's process groups and seed its random states. torch.distributed must be up."""
    single_rank_group.cache_clear()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


@cache
def single_rank_group() -> dist.ProcessGroup:
    """A group of this process alone."""
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def whole_on_every_rank() -> ProcessGroupCollection:
    """Process groups for a module that every rank holds whole: no tensor, context or pipeline parallelism."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.tp = groups.cp = groups.pp = single_rank_group()
    return groups


def slice_for_tensor_rank(x: torch.Tensor) -> torch.Tensor:
    """This tensor-parallel rank's part of the last dimension, as sequence parallelism cuts the sequence."""
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    return x.chunk(size, dim=-1)[rank]
