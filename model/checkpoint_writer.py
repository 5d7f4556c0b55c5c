"""Write the tensors of a checkpoint: megatron-core's torch_dist format, planned by megatron-core.

    __R_N.distcp     tensors of rank R
    common.pt        hyperparameters of the optimizer's groups
    .metadata        where each tensor is
    metadata.json    name and version of the format

megatron-core would write in forked processes and collect their results through a manager process. Here threads write.
A fork of a process that trains copies the tables of all its memory and the locks of its other threads, and it outlives
a killed parent; torch.save holds Python's lock only between the large blocks. The same state gives the same bytes.
"""

from __future__ import annotations

import os
import pickle
import queue
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from megatron.core.dist_checkpointing.validation import validate_sharding_integrity
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.storage import WriteResult

from common.disk import why_not_writable
from common.files import name_file, replacing, sync_file
from model.agreement import on_main_process, raise_everywhere

FILES_PER_RANK = 2
FORMAT = CheckpointingConfig("torch_dist", 1)

# What torch.save says where it cannot write its file, in place of the cause.
FAILED_WRITES = ("PytorchStreamWriter", "inline_container", "iostream error")


def write_tensors(folder: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Write the sharded state of all processes into an existing folder. Collective.

    Args:
        folder: Where to write.
        state: Of model.checkpoint_state; it is used up.
        group: All processes, where another thread uses the default group at the same time.

    Raises:
        CheckpointError: on every process, if a file of any of them could not be written.
    """
    tensors, common = save_preprocess(state, validate_access_integrity=False)
    _check_shards(tensors, group)
    buckets, metadata = _plan(folder, tensors, group)
    results: list[WriteResult] = []
    problem = None
    try:
        if dist.get_rank() == 0:
            torch.save(common, folder / "common.pt")
            sync_file(folder / "common.pt")
            save_config(FORMAT, str(folder))
            sync_file(folder / "metadata.json")
        with ThreadPoolExecutor(FILES_PER_RANK) as threads:
            results = [result for written in threads.map(_write_bucket, buckets) for result in written]
    except (OSError, RuntimeError) as error:
        problem = _failed_write(error, folder)
    raise_everywhere(problem, group)
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(results, everyone, dst=0, group=group)
    on_main_process(lambda: _write_metadata(folder, metadata, everyone or []), group)


def _check_shards(tensors: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Check that the shards of all processes cover every tensor, and nothing twice. Collective."""
    own = [shard.without_data() for shard in nested_values(tensors)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own, group=group)
    validate_sharding_integrity(everyone)


def _plan(folder: Path, tensors: dict[str, Any], group: dist.ProcessGroup | None) -> tuple[list[Any], Metadata]:
    """Return which tensors this process writes into which file, and on rank 0 the metadata. Collective."""
    shards: dict[str, list[Any]] = defaultdict(list)
    for shard in nested_values(tensors):
        if is_main_replica(shard.replica_id):
            shards[shard.key].append(shard)
    filesystem_async._results_queue = queue.Queue()  # unused; without it megatron-core starts its manager process
    writer = filesystem_async.FileSystemWriterAsync(str(folder), thread_count=FILES_PER_RANK)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planned = save_state_dict_async_plan(mcore_to_pyt_state_dict(shards, False), writer, group, planner=planner)
    metadata: Any = planned[0][1]
    return writer.write_buckets or [], metadata


def _write_bucket(bucket: tuple[str, str, tuple[list[Any], list[Any]]]) -> list[WriteResult]:
    """Write one file and return where in it each tensor is."""
    path, name, (_, tensors) = bucket
    transforms = _StorageWriterTransforms()
    with open(path, "wb") as stream:
        results = [
            _write_item(transforms, stream, tensor.cpu(), item, name, SerializationFormat.TORCH_SAVE)
            for item, tensor in tensors
        ]
        stream.flush()
        os.fsync(stream.fileno())
    return results


def _write_metadata(folder: Path, metadata: Metadata, results: Sequence[Sequence[WriteResult]]) -> None:
    metadata.storage_data = {result.index: result.storage_data for of_rank in results for result in of_rank}
    metadata.storage_meta = StorageMeta()  # torch's has a random name and the folder's path
    with replacing(folder / ".metadata") as temporary:
        temporary.write_bytes(pickle.dumps(metadata))


def _failed_write(error: OSError | RuntimeError, folder: Path) -> str:
    """Return why a file could not be written.

    Raises:
        RuntimeError: the cause is not the file system.
    """
    if isinstance(error, OSError):
        name_file(error, folder)
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if any(text in str(error) for text in FAILED_WRITES):
        return f"{folder}: {why_not_writable(folder)}"
    raise error
