"""The cases that the processes of the step tests run: train with the settings of a step, save, load, resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.checkpoint import TrainState, load_checkpoint, save_checkpoint
from model.glmv import build_model_chunks
from model.parts import freeze, part_of
from model.process_groups import initialize_model_parallel
from model.recompute import RecomputeConfig
from model.weights.load import SafetensorsFolder, load_weights
from tests.model.layout_cases import (
    OPTIMIZER,
    SEQ_LENGTH,
    differences_of,
    layout_of,
    of_this_rank,
    packs_of_step,
    tensors_of,
)
from tests.model.test_layouts import EXACT, tensor_errors, variant_of, whole_model_difference
from tests.reference import pack, small_config
from training.health import HealthConfig
from training.optimizer_config import LrScale
from training.step import TrainStep
from training.step_errors import StepError


def make_trainer(
    variant: str,
    folder: str,
    layout: str,
    *,
    frozen: Sequence[str] = (),
    lr_scale: dict[str, float] | None = None,
    recompute: dict[str, str] | None = None,
    dispatch: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    check_determinism: int = 0,
    health: HealthConfig | None = None,
) -> TrainStep:
    """Build a model with the weights in `folder`, its optimizer and schedule, over the processes that call."""
    parallel, stages = layout_of(layout)
    initialize_model_parallel(parallel, seed=1)
    is_balanced = "decoder" not in frozen
    chunks = build_model_chunks(
        small_config(variant),
        parallel,
        pipeline_layout=stages,
        balance_loss_coeff=0.01 * is_balanced,
        expert_bias_update_rate=1e-3 * is_balanced,
        recompute=RecomputeConfig(**(recompute or {})),
        **(dispatch or {}),
    )
    load_weights(chunks, SafetensorsFolder(folder))
    for chunk in chunks:
        freeze(chunk.train(), frozen)
    settings = replace(OPTIMIZER, lr_scale=LrScale(**(lr_scale or {})), **(optimizer or {}))
    return TrainStep(chunks, settings, 3, SEQ_LENGTH, check_determinism, health)


def train(
    variant: str,
    folder: str,
    layout: str = "",
    *,
    steps: Sequence[int] = (1, 2, 3),
    load_from: str = "",
    save_to: str = "",
    keep_in: str = "",
    compare_with: str = "",
    with_empty: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train the steps from the weights in `folder`, or from the checkpoint `load_from`.

    `keep_in` is a file for the parameters after the last step, `compare_with` such a file of another call; with_empty
    puts an empty pack after every pack; `options` are those of `make_trainer`.

    Returns:
        The steps' reports, the tensors that stayed the same, the optimizer's groups on this rank and the number of
        parameters in each, and the differences from `compare_with`.
    """
    trainer = make_trainer(variant, folder, layout, **options)
    if load_from:
        load_checkpoint(Path(load_from), trainer.model_chunks, trainer.optimizer)
    before = copies(trainer)
    reports = take_steps(trainer, variant, steps, with_empty)
    after = copies(trainer)
    if keep_in:
        torch.save(after, keep_in)
    if save_to:
        save_checkpoint(
            Path(save_to),
            trainer.model_chunks,
            hf_files=lambda _: None,
            optimizer=trainer.optimizer,
            train_state=TrainState(step=max(steps)),
        )
    differences = {}
    if compare_with:
        differences = differences_of(after, small_config(variant), torch.load(compare_with, weights_only=True))
    groups = trainer.optimizer.param_groups
    return {
        "reports": reports,
        "tensors": set(after),
        "unmoved": {name for name, tensor in before.items() if torch.equal(tensor, after[name])},
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in groups],
        "group sizes": [len(group["params"]) for group in groups],
        "differences": differences,
    }


def take_steps(
    trainer: TrainStep, variant: str, steps: Sequence[int], with_empty: bool = False
) -> list[dict[str, Any]]:
    """Return the steps' reports. Afterwards the modules hold the weights of the last step."""
    reports = []
    for step in steps:
        packs = packs_of_step(variant, step)
        if with_empty:
            packs = [either for each in packs for either in (each, pack([], SEQ_LENGTH))]
        reports.append(vars(trainer.run(step, of_this_rank(packs))))
    trainer.synchronize_weights()
    return reports


def train_with_nan(variant: str, folder: str, layout: str) -> str:
    """Return the error of a step with a weight that is not a number, on the last pipeline stage."""
    trainer = make_trainer(variant, folder, layout)
    for chunk in trainer.model_chunks:
        for name, parameter in chunk.named_parameters():
            if "decoder.final_layernorm" in name:
                parameter.data[0] = float("nan")
    try:
        take_steps(trainer, variant, [1])
    except StepError as error:
        return str(error)
    return "no error"


def train_over_a_bad_step(variant: str, folder: str, layout: str) -> dict[str, Any]:
    """Train steps 1, 2 and 3, of which 2 has a weight so large that the loss is not finite; and steps 1 and 3 alone.

    Returns:
        The steps that were skipped, the tensors of this rank that differ between the two, and how many were compared.
    """
    health = HealthConfig(on_nonfinite="skip")
    states, skipped = [], []
    for steps in ((1, 2, 3), (1, 3)):
        trainer = make_trainer(variant, folder, layout, health=health)
        for step in steps:
            trainer.synchronize_weights()
            large = step == 2
            norms = [
                parameter
                for chunk in trainer.model_chunks
                for name, parameter in chunk.named_parameters()
                if "decoder.final_layernorm" in name
            ]
            kept = [norm.detach().clone() for norm in norms]
            for norm in norms * large:
                norm.data[0] = 3e38
            report = trainer.run(step, of_this_rank(packs_of_step(variant, step)))
            skipped += [step] * (report.bad is not None)
            for norm, value in zip(norms * large, kept, strict=False):
                norm.data.copy_(value)
        trainer.synchronize_weights()
        states.append(copies(trainer) | optimizer_state(trainer))
    two, one = states
    assert two.keys() == one.keys()
    differences = [name for name in two if not torch.equal(two[name], one[name])]
    return {"skipped": skipped, "differences": differences, "compared": len(two)}


def optimizer_state(trainer: TrainStep) -> dict[str, Tensor]:
    """Copy the moments and step counts of this rank's part of the optimizer."""
    found: dict[str, Tensor] = {}
    for number, part in enumerate(trainer.optimizer.chained_optimizers):
        for index, group in enumerate(part.param_groups):
            found[f"{number}.{index}.step"] = torch.tensor(group["step"])
            for place, parameter in enumerate(group["params"]):
                for name, value in part.optimizer.state[parameter].items():
                    found[f"{number}.{index}.{place}.{name}"] = value.clone()
    return found


def copies(trainer: TrainStep) -> dict[str, Tensor]:
    """Copy the parameters and expert biases that this rank holds."""
    return {name: tensor.clone() for name, tensor in tensors_of(trainer.model_chunks).items()}


def is_in(name: str, parts: Sequence[str]) -> bool:
    part = part_of(name)
    return part in parts or (part == "router" and "decoder" in parts)


# --- checks of the answers --------------------------------------------------------------------------------------------


def case_of(hf_folder: tuple[Path, nn.Module]) -> dict[str, Any]:
    return {"variant": variant_of(hf_folder), "folder": str(hf_folder[0])}


def train_alike(answers: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Check that the last steps equal those of one process: reports, parameters, and expert biases to the bit."""
    for answer in answers:
        for got, want in zip(reversed(answer["reports"]), reversed(one["reports"]), strict=False):
            for key in ("loss", "grad_norm", "lr", "domain_losses", "scaled_lrs", "moe", "part_norms"):
                assert got[key] == pytest.approx(want[key], rel=EXACT), key
    assert whole_model_difference(answers) <= EXACT
    errors = tensor_errors(answer["differences"] for answer in answers)
    assert not any(error for name, error in errors.items() if name.endswith("expert_bias"))


def bytes_held(variant: str, folder: str, layout: str) -> dict[str, int]:
    """Take a step, and return the bytes of this rank's weights, of their gradients, and of the optimizer's moments."""
    trainer = make_trainer(variant, folder, layout)
    take_steps(trainer, variant, (1,), with_empty=False)
    weights = [p for chunk in trainer.model_chunks for p in chunk.parameters()]
    optimizers = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    states = [state for each in optimizers for state in each.optimizer.state.values()]
    return {
        "weights": sum(p.nbytes for p in weights),
        "gradients": sum(p.main_grad.nbytes for p in weights),
        "optimizer": sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq")),
    }
