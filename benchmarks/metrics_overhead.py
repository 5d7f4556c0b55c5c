"""What the metrics cost: CPU time of training steps with and without them, in turns, in one process.

    python -m benchmarks.metrics_overhead [--preset tiny_moe] [--seq-length 512] [--packs 4] [--steps 40]

With: gradient norms of the parts, times of the parts, and all that `training.meter` measures. Without: the same step
with none of these. Pairs of steps train on the same packs, and every second pair begins with the other one. A tiny
model on a CPU is the worst case: the metrics cost the same for every size of a matrix product.

The limit is 2% of a step.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from benchmarks.timing import cost
from benchmarks.training_step import random_sample
from data_pipeline.encoding.batch import Batch, collate
from model.config import GlmvConfig
from model.glmv import build_model_chunks
from model.parallel import ParallelConfig
from model.process_groups import initialize_model_parallel
from model.weights.load import RandomWeights, load_weights
from training.config import ModelChoice, RunConfig, TrainConfig
from training.distributed import process_group
from training.meter import Meter
from training.metrics_config import MetricsConfig
from training.step import TrainStep

LIMIT = 0.02
SEGMENT_MULTIPLE = 8


class NoNorms:
    """In place of `PartNorms`."""

    def compute(self) -> dict[str, float]:
        return {}


class NoTimers:
    """In place of `StepTimers`."""

    def count(self, _: str) -> AbstractContextManager[None]:
        return nullcontext()


def make_packs(config: GlmvConfig, seq_length: int, packs: int, seed: int) -> list[Batch]:
    """Return packs of two samples: images with text, and text."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(packs):
        samples = [
            random_sample(config, [(8, 12), (16, 8)], seq_length // 2, rng),
            random_sample(config, [], seq_length // 2 - 16, rng),
        ]
        made.append(collate(samples, seq_length=seq_length, segment_multiple=SEGMENT_MULTIPLE, pad_id=0))
    return made


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny_moe")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--packs", type=int, default=4, help="packs per step")
    parser.add_argument("--steps", type=int, default=40, help="pairs of steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = GlmvConfig.from_preset(options.preset)
    run = RunConfig(
        model=ModelChoice(preset=options.preset),
        train=TrainConfig(steps=2 * options.steps + 2, seq_length=options.seq_length, precision="fp32"),
        metrics=MetricsConfig(peak_tflops=1.0),
    )
    with process_group():
        initialize_model_parallel(ParallelConfig(), seed=1)
        chunks = build_model_chunks(model, ParallelConfig(), balance_loss_coeff=1e-4, expert_bias_update_rate=1e-3)
        load_weights(chunks, RandomWeights(model, seed=1))
        trainer = TrainStep([chunk.train() for chunk in chunks], run.optimizer, run.train.steps, options.seq_length)
        meter = Meter(run, model, trainer)
        with_metrics: tuple[Any, Any] = trainer.part_norms, trainer.timers
        without: tuple[Any, Any] = NoNorms(), NoTimers()

        def take(step: int, packs: list[Batch], is_measured: bool) -> None:
            parts = with_metrics if is_measured else without
            trainer.part_norms, trainer.timers = parts
            for chunk in chunks:
                chunk.config.timers = parts[1] if is_measured else None
            report = trainer.run(step, packs)
            if is_measured:
                meter.measure(step, report, packs, data_seconds=0.0, seconds=1.0)

        seconds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(options.steps + 1):
            packs = make_packs(model, options.seq_length, options.packs, seed=number)
            for turn in range(2):
                is_measured = bool((number + turn) % 2)
                taken = cost(lambda: take(2 * number + turn + 1, packs, is_measured))  # noqa: B023
                if number:  # the first pair warms up
                    seconds[is_measured].append(taken.cpu)
        pairs = [one / other - 1 for one, other in zip(seconds[True], seconds[False], strict=True)]
        overhead = statistics.median(pairs)
        print(f"{options.preset}, {options.packs} packs of {options.seq_length} tokens, {options.steps} pairs of steps")
        print(f"CPU time of a step without metrics  {1e3 * statistics.median(seconds[False]):8.1f} ms")
        print(f"CPU time of a step with metrics     {1e3 * statistics.median(seconds[True]):8.1f} ms")
        print(f"overhead, median of the pairs       {overhead:8.2%}   limit {LIMIT:.0%}")


if __name__ == "__main__":
    main()
