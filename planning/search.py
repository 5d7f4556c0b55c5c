"""Looks for the layouts with which a run fits and is predicted to be fastest.

Every layout that is possible is rated by the model of step time. From the fastest on, their ranks are built on paper
and take a step; layouts that do not fit are dropped.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from model.config import ConfigError
from model.pipeline_layout import PipelineLayout, layout_for
from planning.limits import Limits
from planning.plan import Plan, Workload, make_plan, static_bytes
from planning.step_time import GPUS_PER_NODE, Rates, StepTime, step_time
from training.config import RunConfig

SECONDS = 80.0  # of processor time after which no other layout is built
TENSOR, CONTEXT, PIPELINE, VIRTUAL = (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16), (1, 2, 4)
EXPERT = (1, 2, 4, 8, 16, 32, 64, 128)
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Candidate:
    """A layout with what is predicted of it."""

    workload: Workload
    time: StepTime
    plan: Plan | None = None  # None: not built


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    fitting: list[Candidate]  # the fastest first
    possible: int  # layouts that the run allows
    built: int  # of them, on paper


def search(workload: Workload, processes: int, limits: Limits, rates: Rates, wanted: int = 5) -> Found:
    """Return the layouts that fit and are predicted to be fastest.

    Args:
        workload: The run; its layout and recomputation are replaced.
        processes: Number of GPUs.
        limits: The memory of a GPU.
        rates: What a GPU reaches.
        wanted: Number of layouts to return, if that many are found in time.
    """
    candidates = sorted(_candidates(workload, processes, limits, rates), key=lambda one: one.time.seconds)
    fitting: list[Candidate] = []
    too_big: list[RunConfig] = []
    built, started = 0, time.process_time()
    for candidate in candidates:
        if len(fitting) == wanted or time.process_time() - started > SECONDS:
            break
        config = candidate.workload.config
        if any(_needs_more(config, other) for other in too_big):
            continue
        built += 1
        plan = make_plan(candidate.workload, processes, limits, stages=_heavy_stages(config))
        if plan.fits:
            fitting.append(replace(candidate, plan=plan))
        else:
            too_big.append(config)
    return Found(fitting, len(candidates), built)


def _heavy_stages(config: RunConfig) -> list[int]:
    """Return the pipeline ranks that can need most: the one with the tower, the next, and the one with the loss."""
    last = config.parallel.pipeline_model_parallel_size - 1
    return sorted({0, min(1, last), last})


def _needs_more(config: RunConfig, too_big: RunConfig) -> bool:
    """Return whether a layout differs from one that does not fit only in that it keeps more activations."""
    if config.parallel != too_big.parallel:
        return False
    return RECOMPUTE.index(config.recompute.decoder) <= RECOMPUTE.index(too_big.recompute.decoder)


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
        if not limits.fits(max(one.total for one in static_bytes(changed, processes, layout))):
            continue
        for choice in RECOMPUTE:
            one = copy.deepcopy(config)
            one.recompute.decoder = choice
            predicted = step_time(one, model, layout, workload.typical, processes, rates)
            yield Candidate(replace(workload, config=one), predicted)


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
