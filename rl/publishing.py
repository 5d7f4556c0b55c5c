"""Publish the policy's weights as a Hugging Face folder, written by all processes together.

    version_0000012/   model-00001-of-00004.safetensors ...   one shard of each process that owns parameters
                       model.safetensors.index.json           written when all shards are
                       config.json, tokenizer ...             the last files; then the folder gets its name

The tensors are those of `tools.convert export` of a checkpoint that is saved at the same moment, bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.disk import free_space
from common.files import sync_file, sync_folder, write_json
from model.agreement import on_main_process, raise_everywhere
from model.errors import CheckpointError
from model.glmv import GlmvModel
from model.hf_config import CONFIG_FILE
from model.weights.files import INDEX
from model.weights.stream import held_parameters, stream_tensors
from model.weights.writer import ShardFile
from rl.errors import RolloutError
from training.hf_files import config_json
from training.step import TrainStep

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of tensors by name


def write_policy(trainer: TrainStep, folder: Path, version: int, *, hf_files: Callable[[Path], None]) -> None:
    """Write the weights that the trainer has now, with adapters merged. Collective.

    Beside the model, a process needs memory for the largest parameter and a tensor rank's slice of it.

    Args:
        trainer: Of the run.
        folder: To make; its parent is made too. Replaced if it exists.
        version: Of the weights; the metadata of the index and of every shard name it.
        hf_files: Fills a folder with the other files, as for a checkpoint; called on rank 0.

    Raises:
        RolloutError: A file cannot be written. What was written is removed.
        WeightsError: A weight is kept in FP8.
    """
    trainer.synchronize_weights()
    chunks = trainer.model_chunks
    own = {
        name: (held.local.dtype, shape)
        for held in held_parameters(chunks).values()
        if held.is_own
        for name, shape in held.weight.hf.items()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    files = _file_names(everyone)
    unfinished = folder.with_name(f".unfinished_{folder.name}")
    try:
        on_main_process(lambda: _begin(unfinished))
        problem = _write_shard(unfinished / files[dist.get_rank()], own, version, chunks)
        raise_everywhere(problem)
        on_main_process(lambda: _finish(unfinished, folder, _index(everyone, files, version), chunks[0], hf_files))
    except CheckpointError as error:
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise RolloutError(
            f"cannot publish version {version} of the weights in {folder}: {error} ({free_space(folder)}); what was "
            "written of it is removed"
        ) from error


def _file_names(everyone: Sequence[Layout]) -> list[str]:
    """Return the name of each process's shard, of which those that own nothing have none."""
    writers = [rank for rank, own in enumerate(everyone) if own]
    numbers = {rank: number for number, rank in enumerate(writers, 1)}
    return [
        f"model-{numbers[rank]:05d}-of-{len(writers):05d}.safetensors" if own else ""
        for rank, own in enumerate(everyone)
    ]


def _index(everyone: Sequence[Layout], files: Sequence[str], version: int) -> dict[str, Any]:
    """Return the content of the index."""
    nbytes = [torch.Size(shape).numel() * dtype.itemsize for own in everyone for dtype, shape in own.values()]
    weight_map = {name: file for own, file in zip(everyone, files, strict=True) for name in own}
    return {"metadata": {"total_size": sum(nbytes), "version": str(version)}, "weight_map": weight_map}


def _begin(unfinished: Path) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)


def _write_shard(path: Path, own: Layout, version: int, chunks: Sequence[GlmvModel]) -> str:
    """Write the tensors that this process owns, and return why they cannot be written. Collective.

    After an error the tensors are still taken: other processes wait for this one's slices of theirs.
    """
    problem = ""
    shard: ShardFile | None = None
    tensors = stream_tensors(chunks)
    try:
        if own:
            shard = ShardFile(path, own, {"version": str(version)})
        for name, tensor in tensors:
            assert shard is not None
            shard.write(name, tensor)
        if shard is not None:
            shard.close()
    except OSError as error:
        problem = f"{path.name}: {error.strerror or error}"
        for _ in tensors:
            pass
    return problem


def _finish(
    unfinished: Path, folder: Path, index: dict[str, Any], model: GlmvModel, hf_files: Callable[[Path], None]
) -> None:
    """Write the index and the other files, and give the folder its name."""
    write_json(unfinished / INDEX, index)
    hf_files(unfinished)
    write_json(unfinished / CONFIG_FILE, config_json(unfinished, model.glmv_config, model.config.params_dtype))
    for path in unfinished.iterdir():
        sync_file(path)
    sync_folder(unfinished)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
    sync_folder(folder.parent)
