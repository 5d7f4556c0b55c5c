"""How long a checkpoint stops training: written at once, and in the background.

    torchrun --nproc_per_node 2 -m benchmarks.saving [--folder DIR] [--repetitions 7]

A tiny GLM-4.5V with wider experts, about 300 MB of weights and optimizer state, trains on two data-parallel ranks,
which take turns with saves of both kinds. "stopped" is the time from the end of one step to the beginning of the next,
on the slower rank. On a machine without a GPU the writer and training share the cores, so that steps beside a writer
are slower; the last line of the table has what a save costs in all. The limit is 20% of the time of a save at once.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.training_step import random_sample
from data_pipeline.encoding.batch import Batch, collate
from model.checkpoint import TrainState
from model.config import GlmvConfig
from model.glmv import build_model_chunks
from model.parallel import ParallelConfig
from model.process_groups import initialize_model_parallel
from model.weights.load import RandomWeights, load_weights
from training.config import CheckpointConfig, RunConfig, TrainConfig
from training.distributed import process_group
from training.optimizer_config import OptimizerConfig
from training.saving import Saver
from training.step import TrainStep

EXPERTS, EXPERT_WIDTH = 16, 960
SEQ_LENGTH = 512
LIMIT = 0.2  # of a save at once


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glmv-benchmarks")
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with process_group():
        bench(options.folder / "saving", options.repetitions)


def bench(folder: Path, repetitions: int) -> None:
    """Train and save."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    trainer = build_trainer()
    batches = [random_pack(trainer.model_chunks[0].glmv_config)]
    savers = {is_async: make_saver(folder / str(is_async), trainer, is_async) for is_async in (False, True)}
    step = 0

    def take_step() -> None:
        nonlocal step
        step += 1
        trainer.run(step, batches)
        for saver in savers.values():
            saver.poll()

    plain, background = list[float](), list[float]()
    stopped: dict[bool, list[float]] = {False: [], True: []}
    beside: list[tuple[int, float]] = []
    for repetition in range(repetitions + 1):  # the first one only warms up
        steps = [seconds(take_step) for _ in range(3)]
        at_once = seconds(partial(savers[False].save, step))
        take_step()
        began = time.perf_counter()
        of_async = seconds(partial(savers[True].save, step))
        slower = []
        while savers[True].is_writing:
            slower.append(seconds(take_step))
        duration = time.perf_counter() - began
        if repetition:
            plain += steps
            stopped[False].append(at_once)
            stopped[True].append(of_async)
            background.append(duration)
            beside.append((len(slower), sum(slower)))
    if dist.get_rank() == 0:
        report(folder, plain, stopped, background, beside)


def report(
    folder: Path,
    plain: list[float],
    stopped: dict[bool, list[float]],
    background: list[float],
    beside: list[tuple[int, float]],
) -> None:
    """Print the table of the medians."""
    newest = max((folder / "True" / "checkpoints").glob("step_*"))
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    step = median(plain)
    extra = median(total - count * step for count, total in beside)
    at_once, of_async = median(stopped[False]), median(stopped[True])
    table = Table("", "at once", "in the background", "ratio", title=f"{size / 1e6:.0f} MB, 2 ranks; seconds")
    table.add_row("training is stopped", f"{at_once:.3f}", f"{of_async:.3f}", f"{of_async / at_once:.0%}")
    table.add_row("until it is the latest, at most", f"{at_once:.3f}", f"{median(background):.3f}", "")
    table.add_row("a step beside it", f"{step:.3f}", f"{sum(t for _, t in beside) / sum(n for n, _ in beside):.3f}", "")
    table.add_row("all that training loses", f"{at_once:.3f}", f"{of_async + extra:.3f}", "")
    Console().print(table)
    print(f"limit {LIMIT:.0%}: {'met' if of_async <= LIMIT * at_once else 'NOT met'}")


def seconds(work: Callable[[], object]) -> float:
    """Run `work` on all ranks and return the time of the slowest."""
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


def build_trainer() -> TrainStep:
    """Build the model and its optimizer on two data-parallel ranks."""
    parallel = ParallelConfig()
    initialize_model_parallel(parallel, seed=1)
    tiny = GlmvConfig.from_preset("tiny_moe")
    decoder = replace(tiny.decoder, n_routed_experts=EXPERTS, moe_intermediate_size=EXPERT_WIDTH)
    config = replace(tiny, decoder=decoder)
    chunks = build_model_chunks(config, parallel)
    load_weights(chunks, RandomWeights(config, 1))
    return TrainStep([chunk.train() for chunk in chunks], OptimizerConfig(), 1_000_000, SEQ_LENGTH)


def random_pack(config: GlmvConfig) -> Batch:
    """Return a pack of random words."""
    sample = random_sample(config, [], SEQ_LENGTH, np.random.default_rng(dist.get_rank()))
    return collate([sample], seq_length=SEQ_LENGTH, segment_multiple=8, pad_id=0)


def make_saver(folder: Path, trainer: TrainStep, is_async: bool) -> Saver:
    """Return a saver that keeps two checkpoints."""
    config = RunConfig(
        train=TrainConfig(output_dir=str(folder)), checkpoint=CheckpointConfig(async_save=is_async, keep_last=2)
    )
    return Saver(config, trainer, TrainState, hf_files=lambda _: None, saved=0)


if __name__ == "__main__":
    main()
