"""How a model is laid out over processes: the sizes, what they must divide, the process groups, and which tokens of a
pack a process works on.

Ranks are numbered as megatron-core numbers them: tensor parallel fastest, then context, data, pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from model.config import ConfigError, DecoderConfig, GlmvConfig, VisionConfig

VISION_SHARDING = ("images", "tensor")
SIZES = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size",
)  # fmt: skip


@dataclass
class ParallelConfig:
    """Sizes of the parallel dimensions; what is left of the world is data parallel."""

    tensor_model_parallel_size: int = 1  # processes that share each layer
    pipeline_model_parallel_size: int = 1  # stages that the layers are divided into, each on other processes
    # chunks of layers per stage, which run in turn; above 1, a rank's packs per step must be a multiple of
    # parallel.pipeline_model_parallel_size
    virtual_pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1  # processes that share each sample's tokens; twice it divides data.segment_multiple
    expert_model_parallel_size: int = 1  # processes that share the routed experts
    expert_tensor_parallel_size: int = 1  # processes that share each routed expert; 1: whole experts, also under TP
    sequence_parallel: bool = False  # split norms and residuals over the tensor ranks; required for MoE under TP
    # what the tensor and context ranks share of a pack's images. images: each runs the whole tower on some of them;
    # tensor: tensor ranks share the tower's layers, context ranks the images
    vision: str = "images"

    def __post_init__(self) -> None:
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name}={getattr(self, name)} must be at least 1")
        if self.vision not in VISION_SHARDING:
            raise ConfigError(f"parallel.vision={self.vision!r}: choose one of {', '.join(VISION_SHARDING)}")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "parallel.sequence_parallel=true splits the sequence over tensor-parallel ranks; set "
                "parallel.tensor_model_parallel_size above 1, or sequence_parallel=false"
            )
        if self.virtual_pipeline_model_parallel_size > 1 and self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"parallel.virtual_pipeline_model_parallel_size={self.virtual_pipeline_model_parallel_size} needs "
                "parallel.pipeline_model_parallel_size above 1; or set it to 1"
            )

    # --- what must hold -------------------------------------------------------------------------------------------

    def check(self, model: GlmvConfig, world_size: int, seq_length: int, segment_multiple: int) -> None:
        """Refuse a layout that cannot be, or that megatron-core would run and get wrong.

        Raises:
            ConfigError: naming the option and what it must divide.
        """
        self._check_world(world_size)
        self._check_decoder(model.decoder)
        if self.vision == "tensor":
            self._check_vision(model.vision)
        self._check_sequence(seq_length, segment_multiple)

    def _check_world(self, world_size: int) -> None:
        for sizes in (
            ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"),
            ("expert_model_parallel_size", "expert_tensor_parallel_size", "pipeline_model_parallel_size"),
        ):
            if world_size % prod(getattr(self, name) for name in sizes):
                named = " x ".join(
                    f"parallel.{name}={getattr(self, name)}" for name in sizes if getattr(self, name) > 1
                )
                raise ConfigError(f"{named} does not divide the {world_size} processes")

    def _check_decoder(self, decoder: DecoderConfig) -> None:
        tp, ep, etp = (
            self.tensor_model_parallel_size, self.expert_model_parallel_size, self.expert_tensor_parallel_size
        )  # fmt: skip
        for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if not decoder.is_moe and getattr(self, name) > 1:
                raise ConfigError(f"parallel.{name}={getattr(self, name)}: this model is dense; set it to 1")
        if decoder.is_moe and tp > 1 and not self.sequence_parallel:
            raise ConfigError(
                "a mixture of experts under tensor parallelism needs parallel.sequence_parallel=true: without it every "
                "tensor-parallel rank routes every token, and the experts' gradients are wrong"
            )
        self._check_divides("tensor_model_parallel_size", tp, {
            "num_attention_heads": decoder.num_attention_heads,
            "vocab_size": decoder.vocab_size,
            "num_key_value_heads": decoder.num_key_value_heads,
            "intermediate_size": decoder.intermediate_size,
            "shared expert width": decoder.moe_intermediate_size * decoder.n_shared_experts,
        })  # fmt: skip
        self._check_divides("expert_model_parallel_size", ep, {"number of experts": decoder.n_routed_experts})
        self._check_divides(
            "expert_tensor_parallel_size", etp, {"moe_intermediate_size": decoder.moe_intermediate_size}
        )

    def _check_vision(self, vision: VisionConfig) -> None:
        self._check_divides("tensor_model_parallel_size", self.tensor_model_parallel_size, {
            "vision num_heads": vision.num_heads,
            "vision out_hidden_size": vision.out_hidden_size,
            "vision intermediate_size": vision.intermediate_size,
        }, mend="; or set parallel.vision=images")  # fmt: skip

    def _check_divides(self, size: str, value: int, dimensions: dict[str, int], mend: str = "") -> None:
        for name, dimension in dimensions.items():
            if dimension % value:
                raise ConfigError(f"parallel.{size}={value} does not divide the model's {name} {dimension}{mend}")

    def _check_sequence(self, seq_length: int, segment_multiple: int) -> None:
        tp, cp = self.tensor_model_parallel_size, self.context_parallel_size
        if cp > 1 and segment_multiple % (2 * cp):
            raise ConfigError(
                f"parallel.context_parallel_size={cp} cuts every sample into {2 * cp} pieces, which "
                f"data.segment_multiple={segment_multiple} does not allow; set it to a multiple of {2 * cp}"
            )
        if seq_length % (tp * cp):
            raise ConfigError(
                f"parallel.tensor_model_parallel_size={tp} x context_parallel_size={cp} does not divide "
                f"train.seq_length={seq_length}"
            )

    def check_micro_batches(self, micro_batches: int) -> None:
        """Raises ConfigError if the interleaved schedule cannot deal with so many packs a rank and step."""
        pp = self.pipeline_model_parallel_size
        if self.virtual_pipeline_model_parallel_size > 1 and micro_batches % pp:
            raise ConfigError(
                f"virtual pipeline stages run micro-batches in groups of parallel.pipeline_model_parallel_size={pp}, "
                f"and a data-parallel rank has {micro_batches}: change train.global_batch_size, or set "
                "parallel.virtual_pipeline_model_parallel_size=1"
            )

    # --- where a process stands -----------------------------------------------------------------------------------

    @property
    def model_parallel_size(self) -> int:
        """Processes that work on the same packs."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // self.model_parallel_size

    def data_parallel_rank(self, rank: int, world_size: int) -> int:
        """Of a process in the world."""
        neighbours = self.tensor_model_parallel_size * self.context_parallel_size
        return rank // neighbours % self.data_parallel_size(world_size)

    @property
    def transformer_fields(self) -> dict[str, object]:
        """This layout in the names of megatron-core's TransformerConfig."""
        virtual = self.virtual_pipeline_model_parallel_size > 1
        return {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": self.virtual_pipeline_model_parallel_size if virtual else None,
            "context_parallel_size": self.context_parallel_size,
            "expert_model_parallel_size": self.expert_model_parallel_size,
            "expert_tensor_parallel_size": self.expert_tensor_parallel_size,
            "sequence_parallel": self.sequence_parallel,
            # The interleaved schedule with its default, batched communication is silently wrong on gloo.
            "overlap_p2p_comm": virtual,
            "batch_p2p_comm": not virtual,
            "batch_p2p_sync": False,  # would wait for the device at every transfer, for the sake of an old torch
            "deallocate_pipeline_outputs": True,
        }


# --- process groups ---------------------------------------------------------------------------------------------------


def initialize_model_parallel(config: ParallelConfig, seed: int) -> None:
    """Make megatron-core's process groups and seed its random states. torch.distributed must be up."""
    single_rank_group.cache_clear()
    same_packs_group.cache_clear()
    parallel_state.destroy_model_parallel()
    virtual = config.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


@cache
def single_rank_group() -> dist.ProcessGroup:
    """A group of this process alone, in which nothing is ever sent. Not over NCCL: all processes would have to make it
    together, and later pipeline stages have no use for it."""
    backend = "gloo" if dist.get_backend() == "nccl" else None
    return dist.new_group([dist.get_rank()], backend=backend, use_local_synchronization=True)


@cache
def same_packs_group() -> dist.ProcessGroup:
    """The processes that work on the same packs as this one: its tensor, context and pipeline ranks. Over gloo, for
    what stays in main memory. The first call is collective."""
    replicas: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(replicas, parallel_state.get_data_parallel_rank())
    members: dict[int, list[int]] = {}
    for rank, replica in enumerate(replicas):
        members.setdefault(replica, []).append(rank)
    # All ranks make all groups: one that only its members make is named after how many groups a rank has, which differs
    # between pipeline stages, so they would wait for each other for ever.
    group, _ = dist.new_subgroups_by_enumeration(list(members.values()), backend="gloo")
    return group


def vision_groups(config: ParallelConfig) -> ProcessGroupCollection:
    """Process groups of the tower and the adapter: not cut by context or pipeline, by tensor if so configured."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.cp = groups.pp = single_rank_group()
    if config.vision == "images":
        groups.tp = single_rank_group()
    return groups


# --- which tokens -----------------------------------------------------------------------------------------------------


def context_tokens(cu_seqlens: Tensor, size: int, rank: int) -> Tensor:
    """The tokens of a pack that context-parallel rank `rank` of `size` works on, in its order.

    Every segment is cut into 2 * size pieces, of which a rank takes one from the front and its mirror image from the
    back, so that all do the same amount of causal attention. With two ranks, segments of 8 and 4 tokens:

        rank 0    0 1 . . . . 6 7 | 8 . . 11
        rank 1    . . 2 3 4 5 . . | . 9 10 .

    Args:
        cu_seqlens: int [segments + 1], in main memory; multiples of 2 * size where size is more than 1.

    Returns:
        int64 [tokens / size].

    Raises:
        ValueError: a segment cannot be cut so.
    """
    if size == 1:
        return torch.arange(int(cu_seqlens[-1]))
    lengths = cu_seqlens.long().diff()
    if (lengths % (2 * size)).any():
        raise ValueError(f"segments of {lengths.tolist()} tokens cannot be cut into {2 * size} equal pieces")
    piece = lengths // (2 * size)
    begins = cu_seqlens[:-1].long()
    starts = torch.stack([begins + rank * piece, begins + (2 * size - 1 - rank) * piece], dim=1).flatten()
    lengths = piece.repeat_interleave(2)
    first = lengths.cumsum(0) - lengths
    return (starts - first).repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


def my_context_tokens(cu_seqlens: Tensor) -> Tensor:
    """`context_tokens` of this process."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    return context_tokens(cu_seqlens, size, rank)


def slice_for_tensor_rank(x: Tensor) -> Tensor:
    """This tensor-parallel rank's part of the last dimension, as sequence parallelism cuts the sequence."""
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    return x.chunk(size, dim=-1)[rank]
