"""How soon the first pack is there after a restart: the plan found again, the pack read and decoded.

    python -m benchmarks.resume --tokenizer DIR [--samples 1000] [--folder DIR]

A run of 1,536 packs of 8,192 tokens a step on 64 data-parallel ranks goes on in the middle of the data: its state is
read, the window of that step is planned anew, and the first pack arrives. The samples are pictures with captions
(benchmarks/jpegs.py). `processor` is time of this process on one core, `wall` is that of the clock, on a machine that
does nothing else: with workers, which begin with further packs meanwhile, it is what counts. Of twenty restarts.
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
from data_pipeline.plan.plan import Position
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.shards.writer import ShardWriter
from model.config import GlmvConfig
from training.pack_cost import pack_cost

PACKS, SEQ_LENGTH, RANKS = 1536, 8192, 64
STEPS_BEFORE = 5
REPETITIONS = 20
LIMIT = 0.2  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer folder of GLM-V")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glmv-benchmarks")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.folder / "resume"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with ShardWriter(folder, "shard", 50 << 20) as writer:
        for key, members in load(given.folder, given.samples):
            writer.write(key, members)
    index_shards(writer.finished, tokenizer=given.tokenizer)

    state = ""
    print(f"{'workers':8}{'':34}{'processor s, least':>20}{'wall s, least':>15}{'median':>9}")
    for workers in (0, 2):
        config = DataConfig(
            tokenizer=str(given.tokenizer), sources=[SourceConfig(str(folder), name="pictures")], num_workers=workers
        )
        state = state or state_in_the_middle(open_loader(config))
        runs = [restart(config, state) for _ in range(REPETITIONS)]
        for name in runs[0]:
            processor, wall = zip(*(run[name] for run in runs), strict=True)
            print(f"{workers:<8}{name:34}{min(processor):20.3f}{min(wall):15.3f}{median(wall):9.3f}")
        counted = median(run["state to first pack"][1] for run in runs)
        print(f"{'':8}limit {LIMIT} s, {len(state)} bytes of state: {'met' if counted < LIMIT else 'NOT met'}\n")


def open_loader(config: DataConfig) -> PackedLoader:
    return PackedLoader(
        config,
        seq_length=SEQ_LENGTH,
        global_batch_size=PACKS,
        cost=pack_cost(GlmvConfig.from_preset("glm45v")),
        data_parallel_rank=0,
        data_parallel_size=RANKS,
    )


def state_in_the_middle(loader: PackedLoader) -> str:
    """As the checkpoint after STEPS_BEFORE steps holds it. The steps are only planned."""
    steps = loader.plan.steps(Position.start(len(loader.sources)))
    position = [next(steps)[1] for _ in range(STEPS_BEFORE)][-1]
    return json.dumps({**loader.state_dict(), "position": position.state()})


def restart(config: DataConfig, state: str) -> dict[str, list[float]]:
    """[processor, wall] seconds of the parts of a restart."""
    parts: dict[str, list[float]] = {}

    def timed(name: str, work: Any) -> Any:
        began, wall = time.process_time(), time.perf_counter()
        result = work()
        parts[name] = [time.process_time() - began, time.perf_counter() - wall]
        return result

    loader = timed("sources opened", lambda: open_loader(config))
    timed("state read", lambda: loader.load_state_dict(json.loads(state)))
    # next_step() would wait for all packs of this rank.
    packs = timed("planned, first pack, workers begun", loader._start)
    assert next(packs).num_tokens > 0.9 * SEQ_LENGTH
    del packs
    parts["state to first pack"] = [sum(spent) for spent in zip(*list(parts.values())[1:], strict=True)]
    again, position = open_loader(config), Position.of(json.loads(state)["position"])
    timed("  of it: plan of the window", lambda: next(again.plan.steps(position)))
    return parts


if __name__ == "__main__":
    main()
