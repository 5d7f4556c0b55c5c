"""Checkpoints: a folder that loads at any layout, committed atomically.

    step_0000100/
        state/              weights, and in a training run the optimizer's state: megatron-core's torch_dist format
        train_state.json    step, data counters, the run's configuration (absent where weights were imported)
        hf/                 config.json, tokenizer, chat template, preprocessor: what an export needs beside the weights

torch_dist reads its `.metadata` with pickle, and whatever that file calls an object too. A folder that a user brings is
therefore looked through first, with an unpickler that knows the classes of torch.distributed.checkpoint and no others;
and only tensors are written and read.
"""

from __future__ import annotations

import json
import pickle
import queue
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from common.files import sync_folder, write_json, write_text

STEP_FOLDER = re.compile(r"step_\d+")
STATE, TRAIN_STATE, HF_FILES, LATEST = "state", "train_state.json", "hf", "latest"

# The optimizer's state on disk: tensors of the parameters' own shapes, the same keys whatever the layout. They are put
# together in main memory, on one data-parallel rank: on every rank's device they would take as much again as the state.
OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


class CheckpointError(ValueError):
    """A folder that is no checkpoint of ours, is incomplete, or holds what is not safe to read."""


@dataclass
class TrainState:
    """Everything that must survive a crash besides tensors.

    There is no random state: the model has no dropout, and what is random in the data is a function of the seed and of
    these counters. The learning rate is a function of the step.
    """

    step: int
    data: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


# --- finding ----------------------------------------------------------------------------------------------------------


def latest_checkpoint(run_folder: str | Path) -> Path | None:
    """The newest committed checkpoint of a run, or None."""
    checkpoints = Path(run_folder) / "checkpoints"
    marker = checkpoints / LATEST
    if not marker.is_file():
        return None
    name = marker.read_text().strip()
    if not STEP_FOLDER.fullmatch(name) or not (checkpoints / name).is_dir():
        raise CheckpointError(
            f"{marker} names {name!r}, which is not there; write the name of an existing step folder into it"
        )
    return checkpoints / name


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint meant by `path`: a step folder itself, or a run's folder, whose newest one is taken."""
    path = Path(path)
    if (path / STATE).is_dir():
        return path
    if (found := latest_checkpoint(path)) is not None:
        return found
    raise CheckpointError(
        f"{path} is no checkpoint: it has neither {STATE}/ (a step folder) nor checkpoints/{LATEST} (a run's folder)"
    )


def is_checkpoint(path: str | Path) -> bool:
    return (Path(path) / STATE).is_dir() or (Path(path) / "checkpoints" / LATEST).is_file()


# --- saving -----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    path: Path,
    model_chunks: Sequence[nn.Module],
    *,
    hf_files: Callable[[Path], None],
    optimizer: MegatronOptimizer | None = None,
    train_state: TrainState | None = None,
) -> None:
    """Write a checkpoint under a temporary name and rename it. Collective.

    Args:
        path: the step folder to make; its parent is made too. Replaced if it exists.
        model_chunks: what this rank holds of the model, a chunk for each of its pipeline stages.
        hf_files: fills the folder it is given with the Hugging Face files; called on rank 0.
        optimizer, train_state: absent where only weights are kept.
    """
    unfinished = path.with_name(f".unfinished_{path.name}")
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / STATE).mkdir(parents=True)
        (unfinished / HF_FILES).mkdir()
        hf_files(unfinished / HF_FILES)
        if train_state is not None:
            write_json(unfinished / TRAIN_STATE, vars(train_state))
    dist.barrier()
    # megatron-core would start a manager process to collect what asynchronous writes report. These are synchronous, and
    # a manager takes seconds to start and outlives a rank that is killed.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(_sharded_state(model_chunks, optimizer, is_loading=False), str(unfinished / STATE))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
        sync_folder(path.parent)
    dist.barrier()


def mark_latest(path: Path) -> None:
    """Make `path` the checkpoint that a restart continues from. The last thing that a save does."""
    write_text(path.parent / LATEST, path.name + "\n")


def remove_old(newest: Path, keep_last: int) -> None:
    """Remove what an interrupted save left, and the step folders before the last `keep_last` up to `newest`, which has
    just been saved. Zero keeps all. Later steps, which a run that was set back has not reached again, stay."""
    for unfinished in newest.parent.glob(".unfinished_*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    steps = sorted(path for path in newest.parent.glob("step_*") if path.name <= newest.name)
    for old in steps[:-keep_last] if keep_last else []:
        shutil.rmtree(old)


# --- loading ----------------------------------------------------------------------------------------------------------


def load_checkpoint(path: Path, model_chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None = None) -> None:
    """Read weights, and with an optimizer its state, into what this rank holds. Collective; any layout.

    Raises:
        CheckpointError: the folder is incomplete, of another model, or not safe to read.
    """
    refuse_foreign_classes(path / STATE)
    groups_as_configured = _hyperparameters(optimizer)
    wanted = _sharded_state(model_chunks, optimizer, is_loading=True)
    try:
        loaded = dist_checkpointing.load(wanted, str(path / STATE))
    except (Exception, CheckpointException) as error:  # of many kinds; all mean that this folder does not fit
        raise CheckpointError(f"{path} does not load into this model: {_reason(error)}") from error
    for number, chunk in enumerate(model_chunks):
        keys = chunk.load_state_dict(loaded[f"model{number}"], strict=False)
        if wrong := [key for key in (*keys.missing_keys, *keys.unexpected_keys) if not key.endswith("_extra_state")]:
            raise CheckpointError(f"{path} does not fit this model: {', '.join(wrong[:5])}")
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        _restore_hyperparameters(optimizer, groups_as_configured, read_train_state(path).step)


def read_train_state(path: Path) -> TrainState:
    file = path / TRAIN_STATE
    if not file.is_file():
        raise CheckpointError(f"{path} holds weights alone (no {TRAIN_STATE}); start from it with model.init_from")
    try:
        return TrainState(**json.loads(file.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({_reason(error)}); use another step") from None


def _sharded_state(
    model_chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None, is_loading: bool
) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for number, chunk in enumerate(model_chunks):
        sharded: Any = chunk
        # Objects (megatron-core's `_extra_state`, empty in this backend) would be written, and read back, with pickle.
        state[f"model{number}"] = {
            key: value for key, value in sharded.sharded_state_dict().items() if not isinstance(value, ShardedObject)
        }
    if optimizer is not None:
        optimizer_: Any = optimizer
        state["optimizer"] = optimizer_.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=OPTIMIZER_FORMAT
        )
    return state


def _hyperparameters(optimizer: MegatronOptimizer | None) -> list[dict[str, Any]]:
    groups = optimizer.param_groups if optimizer is not None else []
    return [{key: value for key, value in group.items() if key not in ("params", "step")} for group in groups]


def _restore_hyperparameters(optimizer: MegatronOptimizer, configured: list[dict[str, Any]], step: int) -> None:
    """Loading put the checkpoint's learning rates in place of the configuration's: of some group with the same weight
    decay, which is all that megatron-core tells groups apart by. And it left `step` out of the groups of an optimizer
    that rank 0 has no part in. Every rank has the same groups in the same order, if need be empty ones."""
    for group, hyperparameters in zip(optimizer.param_groups, configured, strict=True):
        params = group["params"]
        group.clear()
        group.update(hyperparameters, params=params, step=step)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, cut to a length one can read; on the first rank, if torch tells of several."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# --- what may be unpickled --------------------------------------------------------------------------------------------

SAFE_GLOBALS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData",
                                             "BytesIOWriteData"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "device", "float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # The names are compared as they are written: a dotted one could lead out of its module.
        if name in SAFE_GLOBALS.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(
            f"names {module}.{name}, which a checkpoint has no use for; it was not read. "
            "Do not use this checkpoint unless you know who wrote it"
        )


def refuse_foreign_classes(state: Path) -> None:
    """Look through `.metadata` before megatron-core unpickles it.

    Raises:
        CheckpointError: it is missing, damaged, or names a class that is not torch.distributed.checkpoint's own.
    """
    file = state / ".metadata"
    if not file.is_file():
        raise CheckpointError(f"{state.parent} is incomplete: {file} is missing; use another step")
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        kinds = metadata.state_dict_metadata.items()
    except CheckpointError as error:
        raise CheckpointError(f"{file} {error}") from None
    except Exception as error:
        raise CheckpointError(f"{file} is damaged ({_reason(error)}); use another step") from error
    if objects := [key for key, kind in kinds if not isinstance(kind, TensorStorageMetadata)]:
        raise CheckpointError(
            f"{state.parent} holds pickled objects ({', '.join(objects[:3])}); they were not read. A checkpoint "
            "of this program holds tensors alone"
        )
