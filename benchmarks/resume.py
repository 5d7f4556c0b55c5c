"""Time from a restart to the first pack: read the state, plan the window, read and decode the pack.

    python -m benchmarks.resume --tokenizer DIR [--samples 1000] [--folder DIR]

A run of 1,536 packs of 8,192 tokens per step on 64 data-parallel ranks resumes in the middle of the data. The samples
are images with captions (benchmarks/jpegs.py). `CPU` is the CPU time of this process; `wall` is wall time on an idle
machine. With workers, which read the next packs at the same time, wall time is what counts. The figures are of twenty
restarts. The limit is 0.2 s from the state to the first pack.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.jpegs import load
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.loading.loader import PackedLoader
from data_pipeline.plan.plan import PlanPosition
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.shards.writer import ShardWriter
from model.config import GlmvConfig
from training.pack_cost import pack_cost

PACKS, SEQ_LENGTH, RANKS = 1536, 8192, 64
STEPS_BEFORE = 5
REPETITIONS = 20
LIMIT = 0.2  # seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a GLM-V tokenizer folder")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "glmv-benchmarks", help="for samples and shards"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder / "resume"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with ShardWriter(folder, "shard", 50 << 20) as writer:
        for key, members in load(options.folder, options.samples):
            writer.write(key, members)
    index_shards(writer.finished, tokenizer=options.tokenizer)

    state = ""
    print(f"{'workers':8}{'':34}{'CPU s, least':>20}{'wall s, least':>15}{'median':>9}")
    for workers in (0, 2):
        config = DataConfig(
            tokenizer=str(options.tokenizer), sources=[SourceConfig(str(folder), name="images")], num_workers=workers
        )
        state = state or state_in_the_middle(open_loader(config))
        runs = [restart(config, state) for _ in range(REPETITIONS)]
        for name in runs[0]:
            cpu, wall = zip(*(run[name] for run in runs), strict=True)
            print(f"{workers:<8}{name:34}{min(cpu):20.3f}{min(wall):15.3f}{median(wall):9.3f}")
        result = median(run["state to first pack"][1] for run in runs)
        print(f"{'':8}limit {LIMIT} s, {len(state)} bytes of state: {'met' if result < LIMIT else 'NOT met'}\n")


def open_loader(config: DataConfig) -> PackedLoader:
    """Open the loader of rank 0."""
    return PackedLoader(
        config,
        seq_length=SEQ_LENGTH,
        global_batch_size=PACKS,
        cost=pack_cost(GlmvConfig.from_preset("glm45v")),
        data_parallel_rank=0,
        data_parallel_size=RANKS,
    )


def state_in_the_middle(loader: PackedLoader) -> str:
    """Return the loader's state after STEPS_BEFORE steps as JSON. The steps are only planned."""
    steps = loader.plan.steps(PlanPosition.start(len(loader.sources)))
    position = [next(steps)[1] for _ in range(STEPS_BEFORE)][-1]
    return json.dumps({**loader.state_dict(), "position": position.state_dict()})


def restart(config: DataConfig, state: str) -> dict[str, list[float]]:
    """Return [CPU, wall] seconds of the stages of a restart."""
    stages: dict[str, list[float]] = {}

    def timed(name: str, work: Any) -> Any:
        began, wall = time.process_time(), time.perf_counter()
        result = work()
        stages[name] = [time.process_time() - began, time.perf_counter() - wall]
        return result

    loader = timed("sources opened", lambda: open_loader(config))
    timed("state loaded", lambda: loader.load_state_dict(json.loads(state)))
    # next_step() would wait for all packs of this rank.
    packs = timed("planned, first pack, workers started", loader.read_packs)
    assert next(packs).num_tokens > 0.9 * SEQ_LENGTH
    del packs
    stages["state to first pack"] = [sum(seconds) for seconds in zip(*list(stages.values())[1:], strict=True)]
    other, position = open_loader(config), PlanPosition.from_state_dict(json.loads(state)["position"])
    timed("  of this: plan of the window", lambda: next(other.plan.steps(position)))
    return stages


if __name__ == "__main__":
    main()
