"""Parts of the model with learning rates of their own, and frozen ones: against transformers and torch.optim.AdamW, and
in several processes against one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.checkpoint import TrainState, load_checkpoint, save_checkpoint
from model.config import GlmvConfig
from model.glmv import GlmvModel
from model.parallel import ParallelConfig
from model.parts import MODULES, freeze
from model.recompute import RecomputeConfig
from pretrain.optimizer import LrScale
from pretrain.step import StepReport, TrainStep, forward
from tests.launch import metrics
from tests.launch import train as launch
from tests.model.layout_cases import OPTIMIZER, PACKS, SEQ_LENGTH, packs_of_step
from tests.model.test_parity import GRADIENTS, reference_gradients
from tests.pretrain import part_cases
from tests.pretrain.test_step import parameter_distance
from tests.processes import Processes
from tests.reference import TestSample, make_sample, small_config, transformers_loss

EXACT = 1e-5


def part_of_transformers(name: str) -> str:
    """The part of a parameter, by its name in transformers' model."""
    if name.startswith("model.visual.merger."):
        return "adapter"
    if name.startswith("model.visual."):
        return "vision"
    return "router" if name.endswith(".mlp.gate.weight") else "decoder"


def samples_of_step(variant: str, step: int) -> list[TestSample]:
    """The samples of `packs_of_step`, not packed."""
    config = small_config(variant)
    return [make_sample(config, parts, seed=1000 * step + 10 * p + s)
            for p, pack in enumerate(PACKS) for s, parts in enumerate(pack)]  # fmt: skip


# --- learning rates ---------------------------------------------------------------------------------------------------

SCALES = LrScale(vision=0.1, adapter=4.0, decoder=0.5, router=2.0)
SCHEDULE = replace(OPTIMIZER, lr=2e-3, min_lr=2e-4, warmup_steps=1, decay_style="linear")
RATES = (2e-3, 1.4e-3, 8e-4)  # of the first three of four steps


class AdamWOfParts:
    """transformers' model under torch.optim.AdamW: a group for each part, with and without weight decay."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((part_of_transformers(name), parameter.dim() > 1), []).append(parameter)
        self.parts = [part for part, _ in groups]
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "weight_decay": SCHEDULE.weight_decay if decayed else 0.0}
             for (_, decayed), group in groups.items()],
            betas=(SCHEDULE.beta1, SCHEDULE.beta2), eps=SCHEDULE.eps,
        )  # fmt: skip

    def step(self, samples: Sequence[TestSample], rate: float, scales: LrScale) -> None:
        for part, group in zip(self.parts, self.optimizer.param_groups, strict=True):
            group["lr"] = rate * asdict(scales)[part]
        self.optimizer.zero_grad()
        transformers_loss(self.model, samples).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), SCHEDULE.clip_grad)
        self.optimizer.step()


CHANGES = [(SCALES, SCALES), (SCALES, LrScale()), (LrScale(), SCALES)]


@pytest.mark.parametrize(("first", "then"), CHANGES, ids=["scaled", "scaled no more", "scaled later"])
def test_three_steps_equal_adamw_with_a_group_for_each_part(
    build: Callable[..., GlmvModel], reference: nn.Module, tmp_path: Path, first: LrScale, then: LrScale
) -> None:
    """The run is stopped after two steps, and continued with what the configuration says then."""
    model = build().train()
    variant = model.glmv_config.variant
    theirs = AdamWOfParts(copy.deepcopy(reference))
    trainer = TrainStep(model, replace(SCHEDULE, lr_scale=first), steps=4, seq_length=SEQ_LENGTH)
    for step, rate in enumerate(RATES, start=1):
        if step == 3:
            path = tmp_path / "step_0000002"
            save_checkpoint(path, model, companions=lambda _: None, optimizer=trainer.optimizer,
                            train_state=TrainState(step=2))  # fmt: skip
            model = build().train()
            trainer = TrainStep(model, replace(SCHEDULE, lr_scale=then), steps=4, seq_length=SEQ_LENGTH)
            load_checkpoint(path, model, trainer.optimizer)
        scales = then if step == 3 else first
        report = trainer.run(step, packs_of_step(variant, step))
        theirs.step(samples_of_step(variant, step), rate, scales)
        assert report.lr == pytest.approx(rate)
        in_model = {part_of_transformers(name) for name, _ in reference.named_parameters()}
        own = {part: rate * scale for part, scale in asdict(scales).items() if scale != 1 and part in in_model}
        assert report.scaled_lrs == pytest.approx(own)
    assert parameter_distance(model, theirs.model) <= EXACT


# --- freezing ---------------------------------------------------------------------------------------------------------

FREEZES = [["vision"], ["adapter"], ["decoder"], ["vision", "adapter"], ["vision", "decoder"], ["adapter", "decoder"]]
CASES = [*((frozen, "none") for frozen in FREEZES), (["decoder"], "full"), (["vision", "adapter"], "full")]


@pytest.mark.parametrize(("frozen", "recompute"), CASES)
def test_a_frozen_part_stays_as_it_is_and_the_others_train_as_in_transformers(
    build: Callable[..., GlmvModel], reference: nn.Module, frozen: list[str], recompute: str
) -> None:
    update_rate = 0.0 if "decoder" in frozen else 1e-3
    model = build(expert_bias_update_rate=update_rate, recompute=RecomputeConfig(recompute, recompute)).train()
    freeze(model, frozen)
    variant = model.glmv_config.variant
    before = values(model)
    trainer = TrainStep(model, OPTIMIZER, steps=3, seq_length=SEQ_LENGTH)
    report, gradients = first_step(trainer, variant)

    theirs = copy.deepcopy(reference)
    for name, parameter in theirs.named_parameters():
        part = part_of_transformers(name).replace("router", "decoder")
        parameter.requires_grad_(part not in frozen)
    transformers_loss(theirs, samples_of_step(variant, 1)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters() if p.grad is not None])
    assert report.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for parameter in theirs.parameters():
        if not parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    expected = reference_gradients(theirs)
    assert gradients.keys() == {name for name in expected if not is_in(name, frozen)}
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= GRADIENTS * expected[name].norm(), name

    for step in (2, 3):
        trainer.run(step, packs_of_step(variant, step))
    for name, value in values(model).items():
        assert torch.equal(value, before[name]) == is_in(name, frozen), name


def is_in(name: str, parts: Sequence[str]) -> bool:
    return name.startswith(tuple(f"{MODULES[part]}." for part in parts))


def values(model: GlmvModel) -> dict[str, Tensor]:
    """Parameters and expert biases."""
    tensors = [*model.named_parameters(), *(b for b in model.named_buffers() if b[0].endswith("expert_bias"))]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def first_step(trainer: TrainStep, variant: str) -> tuple[StepReport, dict[str, Tensor]]:
    """Its report, and the gradients as they were reduced, before they are clipped."""
    finalize = trainer.model.config.finalize_model_grads_func
    gradients: dict[str, Tensor] = {}

    def keep(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        trained = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
        gradients.update({name: parameter.main_grad.clone() for name, parameter in trained})

    trainer.model.config.finalize_model_grads_func = keep
    report = trainer.run(1, packs_of_step(variant, 1))
    trainer.model.config.finalize_model_grads_func = finalize
    return report, gradients


@pytest.mark.fast
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_nothing_is_kept_for_the_backward_of_a_frozen_tower(build: Callable[..., GlmvModel], recompute: str) -> None:
    model = build(recompute=RecomputeConfig(vision=recompute)).train()
    joined: list[bool] = []
    for module in (model.vision_model, model.adapter):
        module.register_forward_hook(lambda _, __, output: joined.append(output.requires_grad))
    pack = packs_of_step(model.glmv_config.variant, 1)[0]
    for parts, expected in [([], [True, True]), (["vision"], [False, True]), (["adapter"], [False, False])]:
        freeze(model, parts)
        joined.clear()
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            embeddings = model._image_embeddings(pack.pixels, pack.grid_thw, pack.frames)
        assert joined == expected
        assert embeddings.requires_grad == expected[1]
        assert (kept > 0) == expected[1]
    assert forward(model, pack).requires_grad


# --- several processes ------------------------------------------------------------------------------------------------

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {}, "DP2": {}, "EP2": {"expert_model_parallel_size": 2}, "TP2 SP": TP2_SP,
}  # fmt: skip


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[int, Processes]]:
    with Processes(1) as one, Processes(2) as two:
        yield {1: one, 2: two}


TOGETHER = [
    # variant, layout, frozen, recompute
    ("glm4v_moe", "DP2", ["decoder"], "none"),
    ("glm4v_moe", "DP2", ["vision", "adapter"], "full"),
    ("glm4v_moe", "TP2 SP", ["decoder"], "full"),
    ("glm4v_moe", "TP2 SP", ["vision"], "none"),
    ("glm4v_moe", "EP2", ["adapter", "decoder"], "selective"),
    ("glm4v", "TP2 SP", ["decoder"], "selective"),
    ("glm4v", "TP2 SP", ["vision", "adapter"], "none"),
]


@pytest.mark.parametrize(("hf_folder", "layout", "frozen", "recompute"), TOGETHER, indirect=["hf_folder"])
def test_two_ranks_with_frozen_parts_train_as_one_process(
    processes: dict[int, Processes], hf_folder, tmp_path: Path, layout: str, frozen: list[str], recompute: str
) -> None:
    folder, reference = hf_folder
    kept = str(tmp_path / "parameters.pt")
    common = {"variant": reference.config.model_type, "folder": str(folder), "frozen": frozen}
    one = processes[1].run(part_cases.train, layout={}, keep_in=kept, **common)[0]
    two = processes[2].run(part_cases.train, layout=LAYOUTS[layout], recompute=recompute, compare_with=kept, **common)
    for answer in (one, *two):
        assert not answer["frozen but moved"]
        assert not answer["trained but still"]
    train_alike(two, one)


MOVES = [
    # variant, layouts
    ("glm4v_moe", "DP2", "one"),
    ("glm4v_moe", "one", "DP2"),
    ("glm4v_moe", "EP2", "TP2 SP"),
    ("glm4v", "TP2 SP", "DP2"),
]


@pytest.mark.parametrize(("hf_folder", "before", "after"), MOVES, indirect=["hf_folder"])
def test_parts_keep_their_learning_rates_and_state_at_another_layout(
    processes: dict[int, Processes], hf_folder, tmp_path: Path, before: str, after: str
) -> None:
    folder, reference = hf_folder
    kept, saved = str(tmp_path / "parameters.pt"), str(tmp_path / "step_0000002")
    common = {"variant": reference.config.model_type, "folder": str(folder), "lr_scale": asdict(SCALES)}
    one = processes[1].run(part_cases.train, layout={}, steps=[1, 2, 3], keep_in=kept, **common)[0]
    sizes = {name: 1 if name == "one" else 2 for name in LAYOUTS}
    first = processes[sizes[before]].run(
        part_cases.train, layout=LAYOUTS[before], steps=[1, 2], save_to=saved, **common
    )
    then = processes[sizes[after]].run(
        part_cases.train, layout=LAYOUTS[after], steps=[3], load_from=saved, compare_with=kept, **common
    )
    if before == "DP2":
        assert 0 in first[1]["groups"], "each rank has part of every group, so this shows less than it should"
    train_alike(then, one)


@pytest.mark.parametrize("hf_folder", ["glm4v_moe"], indirect=True)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_the_optimizer_survives_ranks_that_lack_whole_groups(
    processes: dict[int, Processes], hf_folder, tmp_path: Path, before: int, after: int
) -> None:
    """The first rank alone writes what is common, and here it has neither experts nor routers."""
    common: dict[str, Any] = {"variant": "glm4v_moe", "folder": str(hf_folder[0])}
    saved = str(tmp_path / "step_0000002")
    one = processes[1].run(part_cases.update_a_stage_each, steps=[1, 2, 3], **common)[0]
    processes[before].run(part_cases.update_a_stage_each, steps=[1, 2], save_to=saved, **common)
    answers = processes[after].run(part_cases.update_a_stage_each, steps=[3], load_from=saved, **common)
    if after == 2:
        assert all(0 in answer["sizes"] for answer in answers)
    for answer in answers:
        assert answer["norms"] == pytest.approx(one["norms"][-1:], rel=1e-6)
        assert answer["groups"] == one["groups"]
        for name, tensor in answer["tensors"].items():
            torch.testing.assert_close(tensor, one["tensors"][name], rtol=1e-6, atol=1e-7)
    assert {name for answer in answers for name in answer["tensors"]} == one["tensors"].keys()


def train_alike(answers: list[dict[str, Any]], one: dict[str, Any]) -> None:
    for answer in answers:
        for got, want in zip(reversed(answer["reports"]), reversed(one["reports"]), strict=False):
            for key in ("loss", "grad_norm", "lr", "domain_losses", "scaled_lrs", "moe"):
                assert got[key] == pytest.approx(want[key], rel=EXACT), key
    squares = [pair for answer in answers for pair in answer["differences"].values()]
    assert (sum(d for d, _ in squares) / sum(s for _, s in squares)) ** 0.5 <= EXACT


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_a_run_freezes_scales_and_recomputes(config_file: Path, tmp_path: Path, single_process: None) -> None:
    """As the configuration says, in the loop: a frozen decoder is the same in every checkpoint, its experts' biases
    too; the adapter's learning rate changes when the configuration does."""
    common = ["freeze=[decoder]", "recompute.decoder=full", "recompute.vision=selective", "model.preset=tiny_moe",
              "parallel.expert_model_parallel_size=2"]  # fmt: skip
    launch(config_file, [*common, "optimizer.lr_scale.adapter=4", "train.steps=3"])
    launch(config_file, [*common, "optimizer.lr_scale.adapter=2"])
    lines = metrics(tmp_path / "run")
    assert [line["lr/adapter"] / line["lr"] for line in lines] == pytest.approx([4, 4, 4, 2, 2, 2])
    assert not any("balance_loss" in line for line in lines)

    folders = [tmp_path / "run" / "checkpoints" / f"step_{step:07d}" for step in (3, 6)]
    models = []
    for folder in folders:
        model = GlmvModel(GlmvConfig.from_hf(folder / "hf"), ParallelConfig())
        load_checkpoint(folder, model)
        models.append(values(model))
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]) == is_in(name, ["decoder"]), name
