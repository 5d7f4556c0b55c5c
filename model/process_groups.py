"""The process groups of a layout."""

from __future__ import annotations

from functools import cache

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from model.parallel import ParallelConfig


def initialize_model_parallel(config: ParallelConfig, seed: int) -> None:
    """Create megatron-core's process groups and seed its random states.

    torch.distributed must be initialised. Groups of an earlier call are replaced.
    """
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
    """Return a group of this process alone, in which nothing is ever sent.

    It is not an NCCL group: all processes would have to create that together, and later pipeline stages do not need it.
    """
    backend = "gloo" if dist.get_backend() == "nccl" else None
    return dist.new_group([dist.get_rank()], backend=backend, use_local_synchronization=True)


@cache
def same_packs_group() -> dist.ProcessGroup:
    """Return the gloo group of the processes that work on the same packs: tensor, context and pipeline ranks.

    It is for data in main memory. The first call is collective.
    """
    replicas: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(replicas, parallel_state.get_data_parallel_rank())
    members: dict[int, list[int]] = {}
    for rank, replica in enumerate(replicas):
        members.setdefault(replica, []).append(rank)
    # All ranks create all groups. The name of a group that only its members create depends on how many groups a rank
    # has. That differs between pipeline stages, so they would wait for each other for ever.
    group, _ = dist.new_subgroups_by_enumeration(list(members.values()), backend="gloo")
    return group


def vision_groups(config: ParallelConfig) -> ProcessGroupCollection:
    """Return the process groups of vision tower and adapter.

    Context and pipeline groups have one rank; so has the tensor group, unless `vision` is "tensor".
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.cp = groups.pp = single_rank_group()
    if config.vision == "images":
        groups.tp = single_rank_group()
    return groups
