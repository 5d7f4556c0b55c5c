"""The parameters that a rank holds, counted from the table of weights, against the modules built on fake ranks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from model.config import GlmvConfig
from model.lora_config import LoraConfig
from model.parallel import ParallelConfig
from model.pipeline_layout import PipelineLayout, layout_for
from model.rank_sizes import adapters_by_rank, parameters_by_rank
from tests.model import rank_size_cases
from tests.te.fake_ranks import Rank
from training.dry_run import one_stage

pytestmark = pytest.mark.fast

SP: dict[str, Any] = {"sequence_parallel": True}
CASES = [
    # preset, processes, layout: the published ones, and every way to split
    ("glm45v", 256, {"expert_model_parallel_size": 8, "pipeline_model_parallel_size": 4}),
    ("glm41v_9b", 64, {"tensor_model_parallel_size": 2, "context_parallel_size": 4, **SP}),
    ("tiny_moe", 8, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4, "vision": "tensor", **SP}),
    (
        "tiny_moe",
        8,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    ),
    ("tiny_moe", 4, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    ("tiny_dense", 4, {"tensor_model_parallel_size": 4, "vision": "tensor", **SP}),
]


@pytest.fixture(scope="module")
def new_process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def layout_of(model: GlmvConfig, parallel: ParallelConfig) -> PipelineLayout:
    sizes = (parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size)
    return layout_for(model, *sizes, segment_lengths=[512] * 4, image_patches=[1024] * 4)


@pytest.mark.parametrize(("preset", "processes", "layout"), CASES)
def test_counts_equal_the_modules_of_every_pipeline_rank(
    new_process: ProcessPoolExecutor, preset: str, processes: int, layout: dict[str, Any]
) -> None:
    if layout.get("expert_tensor_parallel_size"):
        layout = {**layout, **SP}
    model, parallel = GlmvConfig.from_preset(preset), ParallelConfig(**layout)
    pipeline = layout_of(model, parallel)
    virtual = parallel.virtual_pipeline_model_parallel_size
    chunks = [
        {"pipeline_layout": pipeline.stages, "vp_stage": stage if virtual > 1 else None} for stage in range(virtual)
    ]
    per_stage = processes // parallel.pipeline_model_parallel_size
    for pipeline_rank, counted in enumerate(parameters_by_rank(model, parallel, pipeline.stages)):
        rank = Rank((pipeline_rank + 1) * per_stage - 1, processes, layout)
        assert counted == new_process.submit(rank_size_cases.parameters, preset, rank, chunks).result(timeout=120)


@pytest.mark.parametrize("vision", ["images", "tensor"])
def test_adapters_are_counted_as_they_are_built(new_process: ProcessPoolExecutor, vision: str) -> None:
    model = GlmvConfig.from_preset("tiny_moe")
    layout: dict[str, Any] = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "vision": vision, **SP}
    lora = LoraConfig(rank=4, targets=["all-linear", "experts.*"])
    [counted] = adapters_by_rank(model, ParallelConfig(**layout), one_stage(model), lora)
    rank = Rank(1, 2, layout)
    assert counted == new_process.submit(rank_size_cases.adapters, "tiny_moe", rank, lora).result(timeout=120)


WHOLE = {"glm45v": 107_710_927_360, "glm41v_9b": 10_292_777_472}


@pytest.mark.parametrize("preset", WHOLE)
def test_ranks_hold_the_published_number_of_parameters_together(preset: str) -> None:
    """Without tensor parallelism every parameter but the experts is held once, and these once per expert rank."""
    model = GlmvConfig.from_preset(preset)
    experts = 16 if model.decoder.is_moe else 1
    parallel = ParallelConfig(pipeline_model_parallel_size=8, expert_model_parallel_size=experts)
    ranks = parameters_by_rank(model, parallel, layout_of(model, parallel).stages)
    assert sum(n * (experts if group.is_expert else 1) for one in ranks for group, n in one.items()) == WHOLE[preset]
