"""Starts and ends the process group of a run."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.torch_version import TorchVersion

from model.backend import device_count, process_group_arguments
from training.ranks import local_rank, rank, world_size
from training.run_errors import NodeError

# NCCL keeps a record of its last collectives (training.stacks). torch 2.13 warns of the older name of the variable.
NCCL_RECORDS = "TORCH_FR_BUFFER_SIZE" if TorchVersion(torch.__version__) >= "2.13" else "TORCH_NCCL_TRACE_BUFFER_SIZE"
TIMEOUT = timedelta(minutes=30)  # of a collective; reading weights delays a rank's first collective by minutes


def check_processes() -> None:
    """Check what torchrun, or another launcher, said about the processes of the run.

    Raises:
        NodeError: a variable is missing, or there are more processes than GPUs.
    """
    _need_beside_rank("WORLD_SIZE")
    processes, gpus = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), local_rank() + 1), device_count()
    if gpus is not None and processes > gpus:
        raise NodeError(
            f"{socket.gethostname()} has {gpus} GPUs for {processes} processes: start at most one process per GPU "
            "(torchrun --nproc_per_node)"
        )


def _need_beside_rank(*variables: str) -> None:
    missing = [name for name in variables if name not in os.environ]
    if "RANK" in os.environ and missing:
        raise NodeError(f"RANK is set and {', '.join(missing)} not: start the run with torchrun, or unset RANK")


@contextmanager
def process_group(timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Join the processes that torchrun started; without torchrun, form a group of one process.

    Args:
        timeout: of a collective.

    Raises:
        NodeError: a variable of the launcher is missing.
    """
    _need_beside_rank("MASTER_ADDR", "MASTER_PORT")
    # One queue to the device, so that communication starts before the computation with which it overlaps.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault(NCCL_RECORDS, "2000")
    torch.cuda.set_device(local_rank())
    store: dist.Store = dist.HashStore()
    if "RANK" in os.environ:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
        if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
            # torchrun restarts processes with the same store: without a prefix they find old addresses. Each machine
            # counts restarts for itself, so that a run on several needs a new store each time (slurm/common.sh).
            store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    meeting: dict[str, Any] = {"store": store, "rank": rank(), "world_size": world_size()}
    dist.init_process_group(**process_group_arguments(local_rank()), timeout=timeout, **meeting)
    parallel_state.destroy_model_parallel()  # forget the groups of an earlier process group
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()
