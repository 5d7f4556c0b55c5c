"""Solved pipeline layouts, compared with all possible ones, with bounds at full size, and with hand-written tables."""

from __future__ import annotations

import doctest
import random
import time
from collections.abc import Iterator
from itertools import combinations_with_replacement, pairwise

import pytest
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from benchmarks.pipeline_layouts import MEGATRON_BRIDGE, PACKS, SIZES, bridge_layouts, expected_costs
from model import pipeline_layout
from model.config import ConfigError, GlmvConfig
from model.pipeline_layout import PipelineLayout, UnitCosts, layout_for, solve_layout

pytestmark = pytest.mark.fast

GLM_45V = GlmvConfig.from_preset("glm45v")


def check_with_megatron(layout: PipelineLayout, layers: int) -> None:
    """Check that megatron-core accepts the layout and puts its stages on the same ranks."""
    core = PipelineParallelLayerLayout(layout.stages, layout.pipeline_size)
    core.validate_layer_layout(num_layers=layers, mtp_num_layers=0)
    for rank, held in enumerate(core.layout):
        assert [[unit.name for unit in stage] for stage in held] == layout.stages[rank :: layout.pipeline_size]


# --- small models: all layouts ----------------------------------------------------------------------------------------


def every_layout(costs: UnitCosts, pipeline: int, virtual: int) -> Iterator[PipelineLayout]:
    """Yield every layout in which the ranks between the first and the last have layers on their first stage."""
    layers, stages = len(costs.layers), pipeline * virtual
    for cuts in combinations_with_replacement(range(layers + 1), stages - 1):
        counts = [end - begin for begin, end in pairwise([0, *cuts, layers])]
        if all(counts[1 : pipeline - 1]):
            yield PipelineLayout.of(costs, counts, pipeline)


def objective(layout: PipelineLayout) -> tuple[int, bool, int]:
    return max(layout.rank_costs), not all(layout.stages), max(layout.stage_costs)


def random_costs(rng: random.Random) -> UnitCosts:
    layers = rng.randint(1, 8)
    unequal = rng.randint(0, min(3, layers - 1))
    cost = rng.randint(1, 9)
    return UnitCosts(
        first=rng.randint(0, 20),
        layers=(*(rng.randint(1, 9) for _ in range(unequal)), *[cost] * (layers - unequal)),
        last=rng.randint(0, 20),
    )


def test_no_layout_is_better_than_the_solved_one() -> None:
    rng = random.Random(0)
    compared = 0
    while compared < 400:
        costs, pipeline, virtual = random_costs(rng), rng.randint(1, 4), rng.randint(1, 3)
        if pipeline > len(costs.layers) + 2 or pipeline * virtual > 8:
            continue
        solved = solve_layout(costs, pipeline, virtual)
        best = min(map(objective, every_layout(costs, pipeline, virtual)))
        assert objective(solved) == best, (costs, pipeline, virtual)
        compared += 1


@pytest.mark.parametrize("preset", ["tiny_moe", "tiny_dense"])
@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (6, 1)])
def test_layouts_of_tiny_models_leave_no_rank_idle(preset: str, pipeline: int, virtual: int) -> None:
    config = GlmvConfig.from_preset(preset)
    layout = layout_for(config, pipeline, virtual, segment_lengths=[64] * 4, image_patches=[96] * 2)
    check_with_megatron(layout, layers=4)
    assert min(layout.rank_costs) > 0


def test_more_ranks_than_units_are_an_error() -> None:
    config = GlmvConfig.from_preset("tiny_moe")
    with pytest.raises(ConfigError, match=r"pipeline_model_parallel_size=7 .* at most 6"):
        layout_for(config, 7, 1, segment_lengths=[64], image_patches=[])
    with pytest.raises(
        ConfigError, match=r"virtual_pipeline_model_parallel_size=5 .* 2 x 5 stages for 4 decoder layers"
    ):
        layout_for(config, 2, 5, segment_lengths=[64], image_patches=[])


# --- full size: bounds ------------------------------------------------------------------------------------------------


def best_without_virtual_stages(costs: UnitCosts, pipeline: int) -> int:
    """Return the optimum of the linear partition problem, by dynamic programming over units[:n] and ranks."""
    units = [costs.first, *costs.layers, costs.last]
    sums = [0]
    for unit in units:
        sums.append(sums[-1] + unit)
    best: list[float] = [sums[n] for n in range(len(units) + 1)]
    for _ in range(pipeline - 1):
        best = [
            min((max(best[k], sums[n] - sums[k]) for k in range(1, n)), default=float("inf"))
            for n in range(len(units) + 1)
        ]
    return int(best[-1])


def lower_bound(costs: UnitCosts, pipeline: int) -> int:
    """Return a bound on the most expensive rank: an equal share of the cost, or a unit that cannot be split."""
    return max(-(-(costs.first + sum(costs.layers) + costs.last) // pipeline), costs.first, costs.last)


@pytest.mark.parametrize("images", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize(("pipeline", "virtual"), SIZES)
def test_layout_of_the_106b_model_is_within_one_layer_of_the_bound(pipeline: int, virtual: int, images: int) -> None:
    costs = expected_costs(GLM_45V, images)
    begin = time.perf_counter()
    layout = solve_layout(costs, pipeline, virtual)
    assert time.perf_counter() - begin < 1
    print(f"\nPP {pipeline}, VPP {virtual}\n{layout.table()}")
    check_with_megatron(layout, layers=46)
    if virtual == 1:
        assert max(layout.rank_costs) == best_without_virtual_stages(costs, pipeline)
    slack = max(layout.rank_costs) - lower_bound(costs, pipeline)
    assert 0 <= slack < max(costs.layers)


@pytest.mark.parametrize("images", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("pipeline", [4, 8, 16])
def test_layout_is_better_than_the_tables_of_megatron_bridge(pipeline: int, images: int) -> None:
    costs = expected_costs(GLM_45V, images)
    solved = solve_layout(costs, pipeline)
    for _, table in bridge_layouts(costs, pipeline):
        assert max(solved.rank_costs) < max(table.rank_costs)
    assert {sum(layers) for tables in MEGATRON_BRIDGE.values() for layers in tables.values()} == {46}


# --- text -------------------------------------------------------------------------------------------------------------


def test_table_has_a_line_per_rank() -> None:
    layout = solve_layout(UnitCosts(first=5, layers=(2, 3, 3, 3), last=4), pipeline_size=2, virtual_size=2)
    assert layout.table().splitlines() == [
        "rank  stage 0        stage 1  share  of mean",
        "0     embedding + 1  1        50.0%  1.000",
        "1     2              loss     50.0%  1.000",
        "predicted imbalance 1.000",
    ]


def test_docstring_examples_are_right() -> None:
    failed, run = doctest.testmod(pipeline_layout)
    assert run
    assert not failed
