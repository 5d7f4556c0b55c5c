"""What the processes of the planning tests do; a fake process group needs a process that has no other."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from model.config import GlmvConfig
from model.parallel import ParallelConfig
from model.pipeline_layout import layout_for
from planning.alternatives import Smallest, smallest_world, what_would_fit
from planning.kernels import FusedKernelsOnPaper
from planning.limits import Limits
from planning.packs import PackShape, typical_pack
from planning.parameters import distinct_parameters
from planning.plan import (
    Plan,
    Workload,
    make_plan,
    read_workload,
    static_bytes,
)
from planning.rank_trace import RankTrace, Traced, trace_rank
from planning.search import SECONDS, Candidate, Found, LayerMemory, search
from planning.step_time import Rates, StepTime
from rl.config import RlConfig
from tests.launch import ROOT
from tools.plan import app
from tools.plan_rollouts import read_rl_workload
from tools.run_config import load_run
from training.config import RunConfig

SHAPE = PackShape((500, 300, 200), ((1024,), (400, 256), ()))
NO_RESERVES = {"context": 0.0, "nccl": 0.0, "workspaces": 0.0, "fragmentation": 0.0}


def workload(preset: str, *, packs: int = 16, recompute: str = "none", **layout: Any) -> Workload:
    """Return a run of 1,024 tokens per pack."""
    config = RunConfig()
    config.parallel = ParallelConfig(**layout)
    config.train.seq_length, config.train.steps, config.train.global_batch_size = 1024, 10, packs
    config.data.segment_multiple = 8
    config.recompute.decoder = config.recompute.vision = recompute
    return Workload(config, GlmvConfig.from_preset(preset), SHAPE, SHAPE, "the test's")


def traced(run: Workload, processes: int, imbalance: float = 1.0) -> Traced:
    parallel = run.config.parallel
    sizes = (parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size)
    typical = typical_pack(8192)
    stages = layout_for(run.model, *sizes, segment_lengths=typical.lengths, image_patches=typical.patches).stages
    backend = FusedKernelsOnPaper()
    return Traced(run.config, run.model, processes, stages if sizes[0] > 1 else None, SHAPE, backend, imbalance)


def step(
    preset: str,
    processes: int,
    rank: int,
    *,
    quick: bool = False,
    imbalance: float = 1.0,
    log_probs: bool = False,
    **run: Any,
) -> RankTrace:
    made = traced(workload(preset, **run), processes, imbalance)
    return trace_rank(replace(made, log_probs=log_probs), rank, quick=quick)


def parameters(preset: str, processes: int, **layout: Any) -> int:
    """Return the parameters of all ranks, each counted once."""
    built = traced(workload(preset, **layout), processes)
    return sum(distinct_parameters(built, rank) for rank in range(processes))


def plan(preset: str, processes: int, gpu_memory: float, **run: Any) -> tuple[bool, float, Smallest, list[str]]:
    """Return whether a run fits, the bytes that its worst stage needs, the smallest world, and two changes if not."""
    made = make_plan(workload(preset, **run), processes, Limits(gpu_memory=gpu_memory, **NO_RESERVES))
    changes = [] if made.fits else list(islice(what_would_fit(made), 2))
    return made.fits, made.worst.tensors, smallest_world(made), changes


def whole_plan(workload: Workload, processes: int, gpu_memory: float) -> Plan:
    """Return the plan of all stages."""
    return make_plan(workload, processes, Limits(gpu_memory=gpu_memory, **NO_RESERVES))


def padded(preset: str, multiple: int) -> Plan:
    """Plan a pack that fills 1,024 tokens in multiples of 8, an image at its end, in other multiples."""
    made = replace(workload(preset), fullest=PackShape((300, 200, 520), ((1024,), (), (2000,))))
    made.config.data.segment_multiple = multiple
    return make_plan(made, 1, Limits())


def found(preset: str, processes: int, gpu_memory: float, seconds: float = SECONDS) -> Found:
    limits = Limits(gpu_memory=gpu_memory, **NO_RESERVES)
    return search(workload(preset), processes, limits, Rates(), wanted=3, seconds=seconds)


def least_and_needed(preset: str, processes: int) -> list[tuple[float, float, float]]:
    """Return what layouts keep between steps, what they need at least, learned from another one, and what they need."""
    limits, learned = Limits(gpu_memory=1.0, **NO_RESERVES), LayerMemory()
    first: dict[str, Any] = {"pipeline_model_parallel_size": 4, "context_parallel_size": 2}
    learned.learn(make_plan(workload(preset, **first), processes, limits))
    sizes = []
    others: list[dict[str, Any]] = [
        {"pipeline_model_parallel_size": 4},
        {"pipeline_model_parallel_size": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "context_parallel_size": 4},
    ]
    for layout in others:
        run = workload(preset, **layout)
        made = make_plan(run, processes, limits)
        static = tuple(float(one.total) for one in static_bytes(run, processes, made.layout))
        candidate = Candidate(run, made.layout, static, StepTime(0.0, {}))
        sizes.append((max(static), max(learned.least(candidate, processes).values()), made.worst.tensors))
    return sizes


def recipe(file: Path, processes: int) -> tuple[Plan, Smallest]:
    run = load_run(file)
    if isinstance(run, RlConfig):
        workload = read_rl_workload(run, processes, True)
    else:
        workload = read_workload(run, processes, True)
    made = make_plan(workload, processes, Limits())
    return made, smallest_world(made)


def learning(keys: list[str], gpu_memory: float) -> tuple[Plan, str]:
    """Return the plan of configs/tiny/rl.yaml on two GPUs, and the first change with which it would fit."""
    run = load_run(ROOT / "configs/tiny/rl.yaml", ["model.preset=tiny_dense", *keys])
    assert isinstance(run, RlConfig)
    made = make_plan(read_rl_workload(run, 2, True), 2, Limits(gpu_memory=gpu_memory))
    return made, "" if made.fits else next(what_would_fit(made))


def command(*words: str) -> tuple[int, str]:
    """Return the exit status and the output of tools.plan."""
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    return done.exit_code, done.output
