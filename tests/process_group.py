"""The process group of one process, which layers and losses need too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from model.parallel import ParallelConfig
from model.process_groups import initialize_model_parallel


@contextmanager
def alone() -> Iterator[None]:
    """Let this process be a torch.distributed group of one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    initialize_model_parallel(ParallelConfig(), seed=1)
    yield
    dist.destroy_process_group()
