"""The samples of a step, written down where the step was bad: RUN/bad_steps/step_NNNNNNN.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

from common.files import write_json
from data_pipeline.encoding.batch import Batch
from training.metrics import finite_or_null, writes_to

Item = TypeVar("Item")
FOLDER = "bad_steps"


def list_file(run_folder: Path, step: int) -> Path:
    """Return the file with the samples of a bad step."""
    return run_folder / FOLDER / f"step_{step:07d}.json"


def write_samples(run_folder: Path, step: int, facts: dict[str, Any], batches: Sequence[Batch]) -> Path:
    """Write the samples of a step and return the file. Collective; the main process writes.

    Args:
        run_folder: of the run.
        step: number of the step.
        facts: what else is known of the step; goes before the samples.
        batches: the packs of this rank's data-parallel rank.
    """
    packs = gather_packs([samples_of(batch) for batch in batches])
    file = list_file(run_folder, step)
    if dist.get_rank() == 0:
        with writes_to(file):
            file.parent.mkdir(exist_ok=True)
            numbered = [{"pack": number, "samples": samples} for number, samples in enumerate(packs)]
            facts = {name: finite_or_null(value) for name, value in facts.items()}
            write_json(file, {"step": step, **facts, "packs": numbered})
    return file


def samples_of(batch: Batch) -> list[dict[str, Any]]:
    """Return source, shard, key and tokens of every sample of a pack, in its order."""
    found = []
    for sample_id, source, tokens in zip(
        batch.sample_ids, batch.segment_sources, batch.segment_lengths.tolist(), strict=True
    ):
        if sample_id:
            shard, _, key = sample_id.partition("/")
            found.append({"source": source, "shard": shard, "key": key, "tokens": tokens})
    return found


def gather_packs(own: list[Item]) -> list[Item]:
    """Return what every pack of the global batch has, in the order of the packs. Collective.

    Args:
        own: one item for every pack of this rank's data-parallel rank.
    """
    everyone: list[Any] = [None] * parallel_state.get_data_parallel_world_size()
    dist.all_gather_object(everyone, own, group=parallel_state.get_data_parallel_group())
    # Rank r of n has packs r, r+n, r+2n ...: the first of every rank come first.
    return [item for items in zip(*everyone, strict=True) for item in items]
