"""Functions that the processes of tests/rl/test_publishing.py run."""

from __future__ import annotations

import hashlib
import resource
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.checkpoint import save_checkpoint
from model.config import GlmvConfig
from model.glmv import GlmvModel, build_model_chunks
from model.process_groups import initialize_model_parallel
from model.weights.stream import stream_tensors
from rl.errors import RolloutError
from rl.publishing import write_policy
from tests.model import layout_cases, lora_cases
from tests.model.layout_cases import layout_of, of_this_rank, packs_of_step
from tests.reference import small_config
from training.step import TrainStep


def copy_files(source: str, folder: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(Path(source) / name, folder / name)


def publish(
    variant: str, folder: str, layout: str, out: str, checkpoint: str = "", dtype: str = "float32"
) -> dict[str, str]:
    """Take a training step, publish the weights as version 3, and save a checkpoint.

    Returns:
        What `stream_tensors` gives every process: a hash of each tensor.
    """
    trainer = layout_cases.make_trainer(variant, folder, layout, dtype=dtype)
    trainer.run(1, of_this_rank(packs_of_step(variant, 1)))
    hf_files = partial(copy_files, folder)
    write_policy(trainer, Path(out), 3, hf_files=hf_files)
    if checkpoint:
        save_checkpoint(Path(checkpoint), trainer.model_chunks, hf_files=hf_files)
    return hashes(trainer)


def publish_adapters(variant: str, folder: str, layout: str, targets: str, adapters: str, out: str) -> dict[str, str]:
    """Publish weights with adapters."""
    trainer = lora_cases.make_trainer(variant, folder, layout, targets, adapters)
    write_policy(trainer, Path(out), 0, hf_files=partial(copy_files, folder))
    return hashes(trainer)


def hashes(trainer: TrainStep) -> dict[str, str]:
    return {name: hash_of(tensor) for name, tensor in stream_tensors(trainer.model_chunks, to_all=True)}


def hash_of(tensor: Tensor) -> str:
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content.tobytes()).hexdigest()}"


def publish_error(variant: str, folder: str, layout: str, out: str, max_file_bytes: int) -> str:
    """Publish where one process may write no file larger than `max_file_bytes`, and return the error of this one."""
    trainer = layout_cases.make_trainer(variant, folder, layout)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, before[1]))
    try:
        write_policy(trainer, Path(out), 3, hf_files=partial(copy_files, folder))
    except RolloutError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ""


class Untrained:
    """What `write_policy` needs of a trainer, for a model too large to be trained in a test."""

    def __init__(self, model_chunks: list[GlmvModel]) -> None:
        self.model_chunks = model_chunks

    def synchronize_weights(self) -> None:
        pass


def extra_memory(variant: str, layout: str, vocab_size: int, folder: str, out: str) -> dict[str, int]:
    """Publish a model with a large vocabulary; return by how many bytes this process grows, and those of a tensor."""
    parallel, stages = layout_of(layout)
    initialize_model_parallel(parallel, seed=1)
    config = large_config(variant, vocab_size)
    chunks = build_model_chunks(config, parallel, pipeline_layout=stages)
    with torch.no_grad():
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.fill_(0.5)
    trainer: Any = Untrained(chunks)
    run = partial(write_policy, trainer, Path(out), 1, hf_files=partial(copy_files, folder))
    dist.barrier()
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    run()
    return {"grown": peak_bytes() - before, "largest": 4 * vocab_size * config.decoder.hidden_size}


def large_config(variant: str, vocab_size: int) -> GlmvConfig:
    config = small_config(variant)
    return replace(config, decoder=replace(config.decoder, vocab_size=vocab_size))


def resident_bytes() -> int:
    return _status("VmRSS")


def peak_bytes() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))
