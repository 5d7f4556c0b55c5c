"""Build the part of a model that one rank of a layout holds, without other ranks, a GPU or memory.

The process group is torch's fake one, which completes every collective at once. Tensors are fake too: they have shapes,
dtypes and attributes, but no values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from model.backend import Backend
from model.config import GlmvConfig
from model.glmv import GlmvModel
from model.parallel import ParallelConfig
from model.process_groups import initialize_model_parallel


@dataclass(frozen=True)
class Rank:
    """A rank and its layout."""

    number: int = 0
    world_size: int = 1
    layout: dict[str, Any] = field(default_factory=dict)  # fields of ParallelConfig


# The last rank is used: its offsets are not zero, and in a pipeline it is the stage without the vision tower.
RANKS = {
    "one": Rank(),
    "tp2": Rank(1, 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp2_vision": Rank(1, 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "vision": "tensor"}),
    "tp2_etp2": Rank(
        1, 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2}
    ),
    "ep2": Rank(1, 2, {"expert_model_parallel_size": 2}),
    "pp2": Rank(1, 2, {"pipeline_model_parallel_size": 2}),
}
LAYOUTS_OF = {
    "tiny_moe": ("one", "tp2", "tp2_vision", "tp2_etp2", "ep2", "pp2"),
    "tiny_dense": ("one", "tp2", "tp2_vision", "pp2"),
    "glm45v": ("one", "tp2", "ep2"),
    "glm41v_9b": ("one", "tp2"),
}
CASES = [(preset, rank) for preset, ranks in LAYOUTS_OF.items() for rank in ranks]


@contextmanager
def built(
    preset: str, rank: Rank, backend: Backend, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Iterator[GlmvModel]:
    """Yield the part of a preset's model that `rank` holds; `options` are GlmvModel's. Tensors are fake inside."""
    parallel = ParallelConfig(**rank.layout)
    without_gloo = partial(parallel_state.initialize_model_parallel, create_gloo_process_groups=False)
    dist.init_process_group("fake", store=FakeStore(), rank=rank.number, world_size=rank.world_size)
    try:
        with mock.patch.object(parallel_state, "initialize_model_parallel", without_gloo):
            initialize_model_parallel(parallel, seed=1)
        with (
            FakeTensorMode(),
            mock.patch.object(CudaRNGStatesTracker, "fork", return_value=nullcontext()),  # real states, fake tensors
            pretended_gpu(),
        ):
            yield GlmvModel(GlmvConfig.from_preset(preset), parallel, dtype=dtype, backend=backend, **options)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def pretended_gpu() -> Any:
    """Pretend that there is a GPU: Transformer Engine's modules need one to be built, and then use the given device."""
    return mock.patch.object(torch.cuda, "is_available", return_value=True)
