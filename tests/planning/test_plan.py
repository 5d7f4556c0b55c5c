"""Plans: parameters of all ranks, memory against other counts, what fits, the search, the command."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from model.config import GlmvConfig
from model.parallel import ParallelConfig
from model.pipeline_layout import PipelineLayout
from model.rank_sizes import parameters_by_rank
from planning.packs import PackShape, as_batch, pack_full_of_images, segments_of
from planning.plan import different_stages
from planning.step_time import WARM_UP
from rl.config import RlConfig
from rl.engines.config import RolloutConfig
from tests.launch import ROOT, metrics, train
from tests.planning import plan_cases
from tests.training_data import config_file, shards
from tools.plan_rollouts import rollouts_of
from tools.plan_table import search_text
from training.dry_run import one_stage

__all__ = ["config_file", "shards"]

Run = Callable[..., Any]
SP = {"sequence_parallel": True}
WHOLE = 107_710_927_360  # parameters of the published mixture of experts


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """A function that runs a case in another process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda case, *words, **options: pool.submit(case, *words, **options).result(timeout=900)


def whole(preset: str) -> int:
    model = GlmvConfig.from_preset(preset)
    [held] = parameters_by_rank(model, ParallelConfig(), one_stage(model))
    return sum(held.values())


@pytest.mark.parametrize(
    ("preset", "layout"),
    [
        ("tiny_moe", {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4, "vision": "tensor", **SP}),
        ("tiny_moe", {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
        (
            "tiny_dense",
            {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "pipeline_model_parallel_size": 2},
        ),
    ],
)
def test_all_ranks_hold_the_model_once(run: Run, preset: str, layout: dict[str, Any]) -> None:
    assert run(plan_cases.parameters, preset, 8, **layout) == whole(preset)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        {"pipeline_model_parallel_size": 8, "expert_model_parallel_size": 16},
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 4,
            "virtual_pipeline_model_parallel_size": 2,
            "expert_model_parallel_size": 16,
            **SP,
        },
        {
            "tensor_model_parallel_size": 4,
            "pipeline_model_parallel_size": 2,
            "expert_model_parallel_size": 32,
            "vision": "tensor",
            **SP,
        },
        {"context_parallel_size": 4, "pipeline_model_parallel_size": 4, "expert_model_parallel_size": 8},
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 4,
            "expert_model_parallel_size": 8,
            "expert_tensor_parallel_size": 2,
            **SP,
        },
    ],
)
def test_512_ranks_hold_the_published_model_once(run: Run, layout: dict[str, Any]) -> None:
    assert run(plan_cases.parameters, "glm45v", 512, packs=512, **layout) == WHOLE


def test_a_rank_on_paper_holds_what_the_table_of_weights_says(run: Run) -> None:
    """In bf16 with float32 gradients and moments; EP 4 of 8 ranks, so that 2 ranks share an expert and 8 the rest."""
    trace = run(plan_cases.step, "tiny_moe", 8, 3, expert_model_parallel_size=4, packs=8)
    model = GlmvConfig.from_preset("tiny_moe")
    [held] = parameters_by_rank(model, ParallelConfig(expert_model_parallel_size=4), one_stage(model))
    experts = sum(n for group, n in held.items() if group.is_expert)
    others = sum(n for group, n in held.items() if not group.is_expert)
    assert trace.parameters == experts + others
    assert trace.weights == 2 * (experts + others)
    assert trace.gradients == pytest.approx(4 * (experts + others), rel=1e-3)  # buffers are padded
    assert trace.optimizer >= 12 * (experts / 2 + others / 8)
    assert trace.traffic["expert"] > 0


PIPELINES = [(4, 1, 0, 4), (4, 1, 1, 16), (4, 1, 2, 16), (4, 1, 3, 16), (2, 2, 0, 2), (2, 2, 0, 8), (2, 2, 1, 8)]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("stages", "virtual", "rank", "packs"), PIPELINES)
def test_one_pack_tells_what_the_whole_schedule_needs(
    run: Run, stages: int, virtual: int, rank: int, packs: int, recompute: str
) -> None:
    """Apart from some hidden states that are being sent or received, of which the plan has the largest number."""
    options: dict[str, Any] = {"packs": packs, "recompute": recompute, "pipeline_model_parallel_size": stages}
    options["virtual_pipeline_model_parallel_size"] = virtual
    whole_schedule = run(plan_cases.step, "tiny_moe", stages, rank, **options)
    quick = run(plan_cases.step, "tiny_moe", stages, rank, quick=True, **options)
    hidden_states = 1024 * GlmvConfig.from_preset("tiny_moe").decoder.hidden_size * 2
    assert -0.1 <= (quick.activations - whole_schedule.activations) / hidden_states < 4.1
    assert quick.optimizer == pytest.approx(whole_schedule.optimizer, abs=16)  # what a step leaves behind
    assert quick.traffic == pytest.approx(whole_schedule.traffic, rel=0.01)


def test_what_is_sent_is_not_kept(run: Run) -> None:
    """A context rank sends keys and values to the next one in every layer."""
    options: dict[str, Any] = {"context_parallel_size": 2, "packs": 4}
    one, four = (run(plan_cases.step, "tiny_dense", 2 * ranks, 0, **options) for ranks in (4, 1))
    assert four.packs > one.packs
    assert four.activations - one.activations < 0.05 * one.activations


@pytest.mark.parametrize("rank", [0, 7], ids="rank={}".format)
def test_weights_of_virtual_stages_are_gathered_before_each_step(run: Run, rank: int) -> None:
    """A gather that no layer waits for would stop the next step: two steps pass, and send weights."""
    layout = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    trace = run(plan_cases.step, "tiny_moe", 8, rank, quick=True, expert_model_parallel_size=2, packs=16, **layout)
    assert trace.traffic["data"] > trace.weights


def test_settings_that_save_memory_do(run: Run) -> None:
    plain, selective, full = (
        run(plan_cases.step, "tiny_moe", 2, 0, expert_model_parallel_size=2, recompute=choice).activations
        for choice in ("none", "selective", "full")
    )
    assert full < selective < plain
    busy = run(plan_cases.step, "tiny_moe", 2, 0, expert_model_parallel_size=2, imbalance=2.0)
    assert busy.activations > plain
    shared = run(plan_cases.step, "tiny_moe", 2, 0, context_parallel_size=2)
    assert shared.activations < 0.7 * plain
    assert shared.traffic["context"] > 0


def test_what_fits_and_what_would(run: Run) -> None:
    """At the need of 8 GPUs, fewer do not suffice; just below it, the run does not fit, and changes are named."""
    _, needed, _, _ = run(plan_cases.plan, "tiny_dense", 8, 1.0)
    gib = needed / 2**30
    fits, _, smallest, _ = run(plan_cases.plan, "tiny_dense", 8, 1.000001 * gib)
    assert (fits, smallest.processes) == (True, 8)
    fits, _, smallest, changes = run(plan_cases.plan, "tiny_dense", 8, 0.99 * gib)
    assert not fits
    assert smallest.processes is None or smallest.processes > 8
    assert any(change.startswith("recompute.decoder=full: ") for change in changes)


def test_search_returns_layouts_that_fit_the_fastest_first(run: Run) -> None:
    found = run(plan_cases.found, "tiny_moe", 8, 0.25)
    assert found.fitting
    seconds = [one.time.seconds for one in found.fitting]
    assert seconds == sorted(seconds)
    for one in found.fitting:
        whole_plan = run(plan_cases.whole_plan, one.workload, 8, 0.25)
        assert one.plan.fits
        assert whole_plan.fits
        assert one.plan.worst.tensors == whole_plan.worst.tensors
    assert found.possible > found.built >= len(found.fitting)
    assert not found.left


def test_smallest_number_of_gpus_is_planned_not_extrapolated(run: Run) -> None:
    """On 8 GPUs a pack is copied ahead, and the optimizer's update is shared by fewer than on 64, where none is."""
    options: dict[str, Any] = {"packs": 64, "recompute": "full"}
    _, needed, _, _ = run(plan_cases.plan, "tiny_dense", 8, 1.0, **options)
    fits, _, smallest, _ = run(plan_cases.plan, "tiny_dense", 64, 0.99 * needed / 2**30, **options)
    assert fits
    assert smallest.processes is not None
    assert smallest.processes > 8
    assert smallest.reason.startswith("on 8 pipeline rank 0 needs")


def test_different_stages_are_the_first_of_their_kind() -> None:
    """The first layer of the model is dense, the others have experts."""
    model = GlmvConfig.from_preset("tiny_moe")
    assert [model.decoder.is_moe_layer(layer) for layer in range(3)] == [False, True, True]

    def ranks(size: int, *stages: list[str]) -> list[int]:
        return different_stages(PipelineLayout(list(stages), [1] * len(stages), size), model)

    layers = [["decoder"] * count for count in (2, 3, 3, 2, 3)]
    assert ranks(7, ["embedding", "decoder"], *layers, ["decoder", "loss"]) == [0, 1, 2, 6]
    assert ranks(5, ["embedding"], *[["decoder"]] * 3, ["loss"]) == [0, 1, 2, 4]
    assert ranks(2, ["embedding"], ["decoder"], ["decoder"], ["loss"]) == [0, 1]


def test_search_says_that_its_time_was_up(run: Run) -> None:
    found = run(plan_cases.found, "tiny_moe", 8, 0.25, seconds=0.0)
    assert found.left == found.possible > 0
    said = search_text(found, 8)
    assert f"time was up: {found.left:,} of them" in said
    assert "none that was looked at fits" in said


def test_what_layers_keep_is_never_more_than_other_layouts_need(run: Run) -> None:
    sizes = run(plan_cases.least_and_needed, "tiny_moe", 8)
    assert all(between_steps <= least <= needed for between_steps, least, needed in sizes)
    assert sum(between_steps < least for between_steps, least, _ in sizes) >= 3


def test_images_of_a_pack_fill_it() -> None:
    shape = pack_full_of_images(32768, 6144, 16)
    batch = as_batch(shape, 32768, 16, 9, "cpu")
    assert batch.grid_thw.prod(1).tolist() == shape.patches
    assert int((batch.input_ids == 9).sum()) == sum(shape.patches) // 4 > 0.97 * 32768
    assert segments_of([(10, (16, 16, 16)), (4, ())]).images == ((16, 16), ())


@pytest.mark.parametrize("multiple", [16, 32, 64])
def test_a_pack_shrinks_where_its_segments_are_padded_more(multiple: int) -> None:
    """As the layouts of a search do whose context parallelism is larger."""
    planned = pack_full_of_images(32768, 6144, 16)
    shape = planned.within(32768, multiple)
    batch = as_batch(shape, 32768, multiple, 9, "cpu")
    assert (batch.cu_seqlens[1:-1] % multiple == 0).all()
    assert (batch.segment_lengths <= batch.cu_seqlens.diff()).all()
    assert int((batch.input_ids == 9).sum()) == sum(shape.patches) // 4 > 0.97 * 32768
    assert multiple > 16 or shape == planned
    assert PackShape((10, 6), ((8, 8), (16,))).within(8, 8) == PackShape((8,), ((8,),))


def test_a_plan_pads_its_pack_as_the_layout_asks(run: Run) -> None:
    assert run(plan_cases.padded, "tiny_moe", 64).fits


def test_command_plans_the_data_of_a_run_and_writes_a_page(run: Run, config_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    status, output = run(plan_cases.command, "--config", str(config_file), "--world-size", "4", "--out", str(page))
    assert status == 0
    assert re.search(r"the fullest of the first \d+ packs of the run's data: \d+ samples", output)
    assert "fits: pipeline rank 0 needs" in output
    assert page.read_text().count("<svg") >= 3
    assert "<script" not in page.read_text()
    words = ("--skip-files", "--world-size", "4", "--gpu-memory", "4.01")
    status, output = run(plan_cases.command, "--config", str(config_file), *words, "train.seq_length=4096")
    assert status == 3
    assert "DOES NOT FIT: pipeline rank 0 needs" in output
    status, output = run(plan_cases.command, "--config", str(config_file), "--world-size", "3")
    assert status == 2
    assert "train.global_batch_size=4 is not a multiple of the 3 data-parallel ranks" in output


def test_command_names_settings_that_it_does_not_follow(run: Run) -> None:
    words = ["--config", str(ROOT / "configs/glm45v/pretrain.yaml"), "--world-size", "256", "--skip-files"]
    for keys in (["fp8.recipe=blockwise", "moe.dispatcher=flex"], ["moe.shared_expert_overlap=true"]):
        _, output = run(plan_cases.command, *words, *keys)
        for key in keys:
            assert re.search(rf"^differs +{re.escape(key)}: ", output, re.MULTILINE), output


def test_calibrated_plan_predicts_the_run_that_was_measured(run: Run, config_file: Path, tmp_path: Path) -> None:
    measured, words = tmp_path / "measured", ("--config", str(config_file), "--world-size", "2")
    keys = ["train.steps=8", "checkpoint.resume=never", "checkpoint.save_interval=0"]
    train(config_file, [f"train.output_dir={measured}", *keys])
    seconds = median(line["step_seconds"] for line in metrics(measured)[WARM_UP:])
    status, output = run(plan_cases.command, *words, *keys, "--calibrate", str(measured))
    assert status == 0, output
    (predicted,) = re.findall(r"^time +about ([\d.e-]+) s per step", output, re.MULTILINE)
    assert float(predicted) == pytest.approx(seconds, rel=0.01)
    assert not (measured / "begins").exists()
    status, output = run(plan_cases.command, *words, "--calibrate", str(tmp_path / "nothing"))
    assert status == 2
    assert "nothing is no folder: give the folder of a run (train.output_dir)" in output


# --- reinforcement learning -------------------------------------------------------------------------------------------

LEARNING = [
    "--config",
    str(ROOT / "configs/tiny/rl.yaml"),
    "--skip-files",
    "--world-size",
    "2",
    "model.preset=tiny_dense",
]
SERVERS = ["rollout.engine=vllm", "rollout.addresses=[http://node-a:8000]"]


def test_embedded_engine_is_a_second_model_on_the_lead(run: Run) -> None:
    """In float32, and a cache of 4 GB of which half as much again may be allocated."""
    plan, change = run(plan_cases.learning, [], gpu_memory=5.0)
    [stage] = plan.stages
    assert stage.engine == 4 * whole("tiny_dense")
    assert stage.activations > 1.5 * 4e9
    assert not plan.fits
    assert change.startswith("rollout.engine=vllm, with servers: 4.")
    with_servers, _ = run(plan_cases.learning, SERVERS, gpu_memory=5.0)
    [other] = with_servers.stages
    assert (other.engine, other.trace.peak) == (0, stage.trace.peak)
    assert with_servers.fits


def test_plan_names_what_it_does_not_know_of_rollouts(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    status, output = run(plan_cases.command, *LEARNING, "rl.prompts=48", "rl.updates=3", "--out", str(page))
    assert status == 0, output
    # 16 prompts of 1,024 tokens at most, 8 responses of up to 40 tokens each: one rollout fills a pack
    assert re.search(r"^update +128 packs of 1,024 tokens, expected, 64 on each", output, re.MULTILINE), output
    assert re.search(r"^rollouts +384 per step, and up to 4 times as many", output, re.MULTILINE)
    assert re.search(r"^time +about .* per update, of which a step has 3", output, re.MULTILINE)
    unknown = re.findall(r"^not planned +([\w.= ]+):", output, re.MULTILINE)
    assert unknown == ["lengths of responses", "time", "rollout.engine=embedded"]
    assert "not planned" in page.read_text()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("keys", "engine", "is_beside"),
    [
        ({"addresses": ["http://a:1"]}, "vllm, servers: http://a:1", False),
        (
            {"addresses": ["http://a:1"], "start": 2},
            "vllm, servers: http://a:1, 2 on the machine of the first pro",
            True,
        ),
        ({"start": 2, "ray": "auto"}, "vllm, servers: 2 on a Ray cluster", False),
    ],
)
def test_plan_says_where_servers_are(keys: dict[str, Any], engine: str, is_beside: bool) -> None:
    config = RlConfig()
    config.rollout = RolloutConfig(engine="vllm", start_python="python" if "start" in keys else "", **keys)
    planned = rollouts_of(config, GlmvConfig.from_preset("tiny_dense"), [(1000, [])])
    assert dict(planned.facts)["engine"].startswith(engine)
    assert any("memory of the first process's machine" in line for line in planned.unknown) == is_beside


def test_passes_without_gradients_need_less(run: Run) -> None:
    options: dict[str, Any] = {"pipeline_model_parallel_size": 2, "packs": 4}
    first, last = (run(plan_cases.step, "tiny_moe", 2, rank, log_probs=True, **options) for rank in (0, 1))
    assert 0 < first.log_probs < first.activations
    assert 0 < last.log_probs < last.activations
    without = run(plan_cases.step, "tiny_moe", 2, 0, **options)
    assert (without.log_probs, without.activations, without.traffic) == (0, first.activations, first.traffic)


RECIPES = sorted(path.relative_to(ROOT) for path in ROOT.glob("configs/glm4*/*.yaml"))
QUICK = [Path("configs/glm41v/sft_lora.yaml")]


def gpus_of(recipe: Path) -> int:
    (number,) = re.findall(r"^# (\d+) GPUs", (ROOT / recipe).read_text(), re.MULTILINE)
    return int(number)


@pytest.mark.parametrize(
    "recipe", [pytest.param(path, marks=() if path in QUICK else pytest.mark.slow, id=str(path)) for path in RECIPES]
)
def test_recipe_fits_its_gpus(run: Run, recipe: Path) -> None:
    plan, smallest = run(plan_cases.recipe, ROOT / recipe, gpus_of(recipe))
    assert plan.fits
    assert smallest.processes is not None
    assert smallest.processes <= gpus_of(recipe)
    assert len(plan.stages) == plan.layout.pipeline_size
