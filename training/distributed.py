"""Starts and ends the process group of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from model.backend import process_group_arguments

TIMEOUT = timedelta(minutes=30)  # of a collective; reading weights delays a rank's first collective by minutes


def world_size() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


def rank() -> int:
    """Return the rank of this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started; without torchrun, form a group of one process."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # One queue to the device, so that communication starts before the computation with which it overlaps.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.cuda.set_device(local_rank)
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    joined = {} if "RANK" in os.environ else alone
    dist.init_process_group(**process_group_arguments(local_rank), timeout=TIMEOUT, **joined)
    parallel_state.destroy_model_parallel()  # forget the groups of an earlier process group
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()
