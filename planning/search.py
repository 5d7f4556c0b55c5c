"""Looks for the layouts with which a run fits and is predicted to be fastest.

Every layout that is possible is rated by the model of step time. From the fastest on, their ranks are built on paper
and take a step; layouts that do not fit are dropped. What one layout keeps per decoder layer shows of others, without
building them, that they cannot fit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from model.config import ConfigError
from model.pipeline_layout import DECODER, PipelineLayout, layout_for
from planning.chunk_trace import ChunkMemory, Schedule
from planning.limits import Limits
from planning.packs import packs_per_rank
from planning.plan import Plan, Workload, different_stages, make_plan, static_bytes
from planning.step_time import GPUS_PER_NODE, Rates, StepTime, step_time
from training.config import RunConfig

SECONDS = 80.0  # of processor time after which no other layout is built
TENSOR, CONTEXT, PIPELINE, VIRTUAL = (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16), (1, 2, 4)
EXPERT = (1, 2, 4, 8, 16, 32, 64, 128)
RECOMPUTE = ("none", "selective", "full")
CERTAIN = 0.9  # share of the activations of a layer, scaled from another layout, that a layout surely has


@dataclass(frozen=True)
class Candidate:
    """A layout with what is predicted of it."""

    workload: Workload
    layout: PipelineLayout
    static: tuple[float, ...]  # bytes that a rank of each pipeline stage keeps from step to step
    time: StepTime
    plan: Plan | None = None  # None: not built


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    fitting: list[Candidate]  # the fastest first
    possible: int  # layouts that the run allows
    built: int  # of them, on paper
    left: int  # slower ones, at which the search did not look because its time was over


def search(
    workload: Workload,
    processes: int,
    limits: Limits,
    rates: Rates,
    *,
    wanted: int = 5,
    seconds: float = SECONDS,
) -> Found:
    """Return the layouts that fit and are predicted to be fastest.

    Args:
        workload: The run; its layout and recomputation are replaced.
        processes: Number of GPUs.
        limits: The memory of a GPU.
        rates: What a GPU reaches.
        wanted: Number of layouts to return, if that many are found in time.
        seconds: Of processor time, after which no other layout is built.
    """
    candidates = sorted(_candidates(workload, processes, limits, rates), key=lambda one: one.time.seconds)
    fitting: list[Candidate] = []
    layers = LayerMemory()
    built, started = 0, time.process_time()
    for number, candidate in enumerate(candidates):
        if len(fitting) == wanted:
            break
        if time.process_time() - started > seconds:
            return Found(fitting, len(candidates), built, len(candidates) - number)
        least = layers.least(candidate, processes)
        if not limits.fits(max(least.values())):
            continue
        built += 1
        likely_first = sorted(least, key=lambda rank: -least[rank])
        plan = make_plan(candidate.workload, processes, limits, stages=likely_first, until_too_big=True)
        layers.learn(plan)
        if plan.fits:
            fitting.append(replace(candidate, plan=plan))
    return Found(fitting, len(candidates), built, 0)


class LayerMemory:
    """What a pack keeps in a decoder layer, learned from layouts that were built."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, bool], float] = {}  # by all ranks that share the tokens of a pack

    def learn(self, plan: Plan) -> None:
        """Take over what the stages of decoder layers alone keep."""
        for stage in plan.stages:
            chunks = plan.layout.stages[stage.trace.pipeline_rank :: plan.layout.pipeline_size]
            units = [unit for chunk in chunks for unit in chunk]
            if units and set(units) == {DECODER}:
                key, ranks = _sharing(plan.workload.config)
                self._kept[key] = sum(stage.trace.kept) / len(units) * ranks

    def least(self, candidate: Candidate, processes: int) -> dict[int, float]:
        """Return the bytes that ranks of a layout need at least, by pipeline rank; of `different_stages`."""
        config, layout = candidate.workload.config, candidate.layout
        key, ranks = _sharing(config)
        kept = CERTAIN * self._kept.get(key, 0.0) / ranks
        packs = packs_per_rank(config, processes)
        needed = {}
        for rank in different_stages(layout, candidate.workload.model):
            sizes = [kept * units.count(DECODER) for units in layout.stages[rank :: layout.pipeline_size]]
            chunks = [ChunkMemory(round(size), round(size), round(size)) for size in sizes]
            # A longer schedule repeats itself.
            schedule = Schedule(layout.pipeline_size, rank, len(chunks), min(packs, 4 * layout.pipeline_size))
            needed[rank] = candidate.static[rank] + schedule.peak(chunks, 0)
        return needed


def _sharing(config: RunConfig) -> tuple[tuple[str, bool], int]:
    """Return what a layer's activations depend on beside the tokens of a rank, and how many ranks share those."""
    parallel = config.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return (config.recompute.decoder, parallel.expert_model_parallel_size > 1), ranks


def _candidates(workload: Workload, processes: int, limits: Limits, rates: Rates) -> Iterator[Candidate]:
    """Yield the layouts that are possible and whose weights, gradients and optimizer fit."""
    model = workload.model
    experts = EXPERT if model.decoder.is_moe else (1,)

    @cache
    def layout_of(pipeline: int, virtual: int) -> PipelineLayout:
        work = {"segment_lengths": workload.typical.lengths, "image_patches": workload.typical.patches}
        return layout_for(model, pipeline, virtual, **work)

    for tensor, context, pipeline, virtual, expert in product(TENSOR, CONTEXT, PIPELINE, VIRTUAL, experts):
        if tensor > GPUS_PER_NODE or (virtual > 1 and pipeline == 1):
            continue
        config = _with_layout(workload.config, tensor, context, pipeline, virtual, expert)
        try:
            config.check_layout(model, processes)
            layout = layout_of(pipeline, virtual)
        except ConfigError:
            continue
        changed = replace(workload, config=config)
        static = tuple(float(one.total) for one in static_bytes(changed, processes, layout))
        if not limits.fits(max(static)):
            continue
        for choice in RECOMPUTE:
            one = copy.deepcopy(config)
            one.recompute.decoder = choice
            predicted = step_time(one, model, layout, workload.typical, processes, rates)
            yield Candidate(replace(workload, config=one), layout, static, predicted)


def _with_layout(config: RunConfig, tensor: int, context: int, pipeline: int, virtual: int, expert: int) -> RunConfig:
    changed = copy.deepcopy(config)
    parallel = changed.parallel
    parallel.tensor_model_parallel_size, parallel.context_parallel_size = tensor, context
    parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size = pipeline, virtual
    parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size = expert, 1
    parallel.sequence_parallel = tensor > 1
    if context > 1 and changed.data.segment_multiple % (2 * context):
        changed.data.segment_multiple = 2 * context
    changed.recompute.vision = "full"
    return changed
