"""Parts of the model with scaled learning rates, and frozen parts.

Compared with transformers and torch.optim.AdamW, and in several processes with one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.canonical_names import canonical_name
from model.checkpoint import TrainState, load_checkpoint, save_checkpoint
from model.config import GlmvConfig
from model.glmv import GlmvModel
from model.parallel import ParallelConfig
from model.parts import freeze
from model.recompute import RecomputeConfig
from tests.launch import metrics
from tests.launch import train as launch
from tests.model.layout_cases import OPTIMIZER, SEQ_LENGTH, packs_of_step, samples_of_step, tensors_of
from tests.model.test_layouts import EXACT, GRADIENTS
from tests.processes import Processes
from tests.reference import TestSample, parameter_distance, reference_gradients, transformers_loss
from tests.training import step_cases
from tests.training.step_cases import case_of, is_in, train_alike
from training.determinism import trained
from training.optimizer_config import LrScale
from training.step import StepReport, TrainStep, forward


def part_of_transformers(name: str) -> str:
    """Return the part of a parameter, by its name in transformers' model."""
    if name.startswith("model.visual.merger."):
        return "adapter"
    if name.startswith("model.visual."):
        return "vision"
    return "router" if name.endswith(".mlp.gate.weight") else "decoder"


# --- learning rates ---------------------------------------------------------------------------------------------------

SCALES = LrScale(vision=0.1, adapter=4.0, decoder=0.5, router=2.0)
SCHEDULE = replace(OPTIMIZER, lr=2e-3, min_lr=2e-4, warmup_steps=1, decay_style="linear")
RATES = (2e-3, 1.4e-3, 8e-4)  # of the first three of four steps


class AdamWOfParts:
    """transformers' model under torch.optim.AdamW: a group per part, with and without weight decay."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((part_of_transformers(name), parameter.dim() > 1), []).append(parameter)
        self.parts = [part for part, _ in groups]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": group, "weight_decay": SCHEDULE.weight_decay if decayed else 0.0}
                for (_, decayed), group in groups.items()
            ],
            betas=(SCHEDULE.beta1, SCHEDULE.beta2),
            eps=SCHEDULE.eps,
        )

    def step(self, samples: Iterable[TestSample], rate: float, scales: LrScale) -> None:
        for part, group in zip(self.parts, self.optimizer.param_groups, strict=True):
            group["lr"] = rate * asdict(scales)[part]
        self.optimizer.zero_grad(set_to_none=False)  # in a step without images the vision tower moves by its momentum
        transformers_loss(self.model, samples).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), SCHEDULE.clip_grad)
        self.optimizer.step()


CHANGES = [
    # variant, learning rates of the first two steps, of the third
    ("glm4v_moe", SCALES, SCALES),
    ("glm4v_moe", SCALES, LrScale()),
    ("glm4v", SCALES, SCALES),
    ("glm4v", LrScale(), SCALES),
]


@pytest.mark.parametrize(("hf_folder", "first", "then"), CHANGES, indirect=["hf_folder"])
def test_three_steps_equal_adamw_with_a_group_per_part(
    build: Callable[..., GlmvModel], reference: nn.Module, tmp_path: Path, first: LrScale, then: LrScale
) -> None:
    """The run stops after two steps, and resumes with other learning rates."""
    model = build().train()
    variant = model.glmv_config.variant
    expected = AdamWOfParts(copy.deepcopy(reference))
    trainer = TrainStep([model], replace(SCHEDULE, lr_scale=first), steps=4, seq_length=SEQ_LENGTH)
    for step, rate in enumerate(RATES, start=1):
        if step == 3:
            path = tmp_path / "step_0000002"
            trainer.synchronize_weights()
            save_checkpoint(
                path,
                [model],
                hf_files=lambda _: None,
                optimizer=trainer.optimizer,
                train_state=TrainState(step=2),
            )
            model = build().train()
            trainer = TrainStep([model], replace(SCHEDULE, lr_scale=then), steps=4, seq_length=SEQ_LENGTH)
            load_checkpoint(path, [model], trainer.optimizer)
        scales = then if step == 3 else first
        report = trainer.run(step, packs_of_step(variant, step))
        expected.step(chain(*samples_of_step(variant, step)), rate, scales)
        assert report.lr == pytest.approx(rate)
        in_model = {part_of_transformers(name) for name, _ in reference.named_parameters()}
        own = {part: rate * scale for part, scale in asdict(scales).items() if scale != 1 and part in in_model}
        assert report.scaled_lrs == pytest.approx(own)
    trainer.synchronize_weights()
    assert parameter_distance(model, expected.model) <= EXACT


# --- freezing ---------------------------------------------------------------------------------------------------------

FREEZES = [
    # variant, frozen, recompute
    ("glm4v_moe", ["vision"], "none"),
    ("glm4v_moe", ["adapter"], "none"),
    ("glm4v_moe", ["decoder"], "full"),
    ("glm4v_moe", ["vision", "adapter"], "full"),
    ("glm4v_moe", ["vision", "decoder"], "none"),
    ("glm4v_moe", ["adapter", "decoder"], "none"),
    ("glm4v_moe", ["router"], "full"),
    ("glm4v_moe", ["vision", "router"], "none"),
    ("glm4v", ["vision", "adapter"], "none"),
    ("glm4v", ["decoder"], "none"),
]


@pytest.mark.parametrize(("hf_folder", "frozen", "recompute"), FREEZES, indirect=["hf_folder"])
def test_frozen_part_stays_the_same_and_others_train_as_in_transformers(
    build: Callable[..., GlmvModel], reference: nn.Module, frozen: list[str], recompute: str
) -> None:
    update_rate = 0.0 if {"decoder", "router"} & set(frozen) else 1e-3
    model = build(expert_bias_update_rate=update_rate, recompute=RecomputeConfig(recompute, recompute)).train()
    freeze(model, frozen)
    variant = model.glmv_config.variant
    before = values(model)
    trainer = TrainStep([model], OPTIMIZER, steps=3, seq_length=SEQ_LENGTH)
    report, gradients = first_step(trainer, variant)

    expected_model = copy.deepcopy(reference)
    for name, parameter in expected_model.named_parameters():
        part = part_of_transformers(name)
        parameter.requires_grad_(not (part in frozen or (part == "router" and "decoder" in frozen)))
    transformers_loss(expected_model, chain(*samples_of_step(variant, 1))).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in expected_model.parameters() if p.grad is not None])
    assert report.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for parameter in expected_model.parameters():
        if not parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    expected = reference_gradients(expected_model)
    assert gradients.keys() == {name for name in expected if not is_in(name, frozen)}
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= GRADIENTS * expected[name].norm(), name

    for step in (2, 3):
        trainer.run(step, packs_of_step(variant, step))
    trainer.synchronize_weights()
    for name, value in values(model).items():
        assert torch.equal(value, before[name]) == is_in(name, frozen), name


def values(model: GlmvModel) -> dict[str, Tensor]:
    """Copy the parameters and expert biases."""
    return {name: tensor.clone() for name, tensor in tensors_of([model]).items()}


def first_step(trainer: TrainStep, variant: str) -> tuple[StepReport, dict[str, Tensor]]:
    """Return the report of the first step, and its reduced gradients before clipping."""
    (model,) = trainer.model_chunks
    finalize = model.config.finalize_model_grads_func
    gradients: dict[str, Tensor] = {}

    def keep(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        gradients.update({canonical_name(model, name): p.main_grad.clone() for name, p in trained(model).items()})

    model.config.finalize_model_grads_func = keep
    report = trainer.run(1, packs_of_step(variant, 1))
    model.config.finalize_model_grads_func = finalize
    return report, gradients


@pytest.mark.fast
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_frozen_vision_tower_keeps_nothing_for_the_backward_pass(
    build: Callable[..., GlmvModel], recompute: str
) -> None:
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

        images = torch.arange(len(pack.grid_thw))
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            embeddings = model.embed_images(images, pack.patches, pack.grid_thw, pack.frames_per_image)
        assert joined == expected
        assert embeddings.requires_grad == expected[1]
        assert (kept > 0) == expected[1]
    assert forward(model, pack).requires_grad


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[int, Processes]]:
    with Processes(1) as one, Processes(2) as two:
        yield {1: one, 2: two}


@pytest.fixture(scope="module")
def alone(
    processes: dict[int, Processes], hf_folder: tuple[Path, nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[dict[str, Any], str]]:
    """Train three steps in one process: its answer, and the file of its parameters after them. Each case runs once."""

    @cache
    def train(frozen: tuple[str, ...], scaled: bool = False) -> tuple[dict[str, Any], str]:
        kept = str(tmp_path_factory.mktemp("alone") / "parameters.pt")
        lr_scale = asdict(SCALES) if scaled else None
        case = {**case_of(hf_folder), "frozen": frozen, "lr_scale": lr_scale}
        return processes[1].run(step_cases.train, keep_in=kept, **case)[0], kept

    return train


@pytest.fixture(scope="module")
def saved(processes: dict[int, Processes], hf_folder: tuple[Path, nn.Module], tmp_path_factory: pytest.TempPathFactory):
    """Save a checkpoint after two steps in a layout: the answers of its ranks, and its path. Each case runs once."""

    @cache
    def save(layout: str, frozen: tuple[str, ...]) -> tuple[list[dict[str, Any]], str]:
        path = str(tmp_path_factory.mktemp("saved") / "step_0000002")
        case = {**case_of(hf_folder), "frozen": frozen, "lr_scale": asdict(SCALES)}
        processes_ = processes[2 if layout else 1]
        return processes_.run(step_cases.train, layout=layout, steps=[1, 2], save_to=path, **case), path

    return save


TOGETHER = [
    # variant, layout, frozen, recompute
    ("glm4v_moe", "DP2", ["decoder"], "none"),
    ("glm4v_moe", "TP2 SP", ["decoder"], "full"),
    ("glm4v_moe", "PP2", ["decoder"], "none"),  # the last stage has nothing to train
    ("glm4v_moe", "EP2", ["adapter", "decoder"], "selective"),
    ("glm4v_moe", "TP2 SP", ["vision"], "none"),
    ("glm4v_moe", "PP2 VPP2", ["vision", "adapter"], "full"),
    ("glm4v_moe", "CP2", ["vision", "adapter"], "selective"),
    ("glm4v_moe", "TP2 SP vision=tensor", ["vision", "adapter"], "none"),
    ("glm4v", "PP2 VPP2", ["decoder"], "selective"),
    ("glm4v", "TP2 SP", ["vision", "adapter"], "none"),
    ("glm4v", "DP2", ["vision", "adapter"], "full"),
]


@pytest.mark.parametrize(("hf_folder", "layout", "frozen", "recompute"), TOGETHER, indirect=["hf_folder"])
def test_two_ranks_with_frozen_parts_train_as_one_process(
    processes: dict[int, Processes], hf_folder, alone, layout: str, frozen: list[str], recompute: str
) -> None:
    one, kept = alone(tuple(frozen))
    two = processes[2].run(
        step_cases.train,
        layout=layout,
        frozen=frozen,
        recompute={"decoder": recompute, "vision": recompute},
        compare_with=kept,
        **case_of(hf_folder),
    )
    for answer in (one, *two):
        assert answer["unmoved"] == {name for name in answer["tensors"] if is_in(name, frozen)}
    train_alike(two, one)


# In this layout no rank has parameters of every group: rank 0, which writes the common part of a checkpoint, has no
# experts and no routers.
APART = "PP2 stages=Et|tttL"
MOVES = [
    # variant, layout of the first two steps, of the third, frozen
    ("glm4v_moe", "DP2", "", []),
    ("glm4v_moe", "", "DP2", []),
    ("glm4v_moe", "EP2", "TP2 SP", []),
    ("glm4v_moe", APART, "", []),
    ("glm4v_moe", "", APART, []),
    ("glm4v_moe", APART, APART, []),
    ("glm4v_moe", "PP2", "PP2", ["decoder"]),
    ("glm4v_moe", "PP2", "EP2", ["decoder"]),
    ("glm4v_moe", "EP2", "PP2", ["decoder"]),
    ("glm4v", "TP2 SP", "PP2 VPP2", ["vision"]),
]


@pytest.mark.parametrize(("hf_folder", "before", "after", "frozen"), MOVES, indirect=["hf_folder"])
def test_parts_keep_their_learning_rates_and_state_at_another_layout(
    processes: dict[int, Processes], hf_folder, alone, saved, before: str, after: str, frozen: list[str]
) -> None:
    one, kept = alone(tuple(frozen), scaled=True)
    first, checkpoint = saved(before, tuple(frozen))
    then = processes[2 if after else 1].run(
        step_cases.train,
        layout=after,
        steps=[3],
        load_from=checkpoint,
        compare_with=kept,
        frozen=frozen,
        lr_scale=asdict(SCALES),
        **case_of(hf_folder),
    )
    for answer in then:
        assert answer["groups"] == one["groups"]
    for layout, answers in ((before, first), (after, then)):
        if layout == APART:
            assert all(0 in answer["group sizes"] for answer in answers)
        if layout == "PP2":
            assert sum(answers[1]["group sizes"]) == 0
    train_alike(then, one)


# --- end to end -------------------------------------------------------------------------------------------------------


def test_run_freezes_scales_and_recomputes(config_file: Path, tmp_path: Path, single_process: None) -> None:
    """The adapter's learning rate changes with the configuration.

    A frozen decoder is the same in every checkpoint, with its expert biases, also on the second pipeline stage.
    """
    common = ["freeze=[decoder]", "recompute.decoder=full", "recompute.vision=selective"]
    experts, stages = "parallel.expert_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
    launch(config_file, [*common, experts, "optimizer.lr_scale.adapter=4", "train.steps=3"])
    launch(config_file, [*common, stages, "optimizer.lr_scale.adapter=2"])
    lines = metrics(tmp_path / "run")
    assert [line["lr/adapter"] / line["lr"] for line in lines] == pytest.approx([4, 4, 4, 2, 2, 2])
    assert not any("balance_loss" in line for line in lines)

    folders = [tmp_path / "run" / "checkpoints" / f"step_{step:07d}" for step in (3, 6)]
    models = []
    for folder in folders:
        model = GlmvModel(GlmvConfig.from_hf(folder / "hf"), ParallelConfig())
        load_checkpoint(folder, [model])
        models.append(values(model))
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]) == is_in(name, ["decoder"]), name
