"""Functions that the processes of the LoRA tests run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

import training.step
from model.checkpoint import TrainState, load_checkpoint, save_checkpoint
from model.glmv import build_model_chunks
from model.lora import add_adapters
from model.lora_config import LoraConfig
from model.lora_dropout import PackNumber
from model.lora_layers import adapters_of
from model.lora_weights import fill_adapters
from model.process_groups import initialize_model_parallel
from model.recompute import RecomputeConfig
from model.weights.load import SafetensorsFolder, load_weights
from tests.model.layout_cases import OPTIMIZER, SEQ_LENGTH, layout_of, of_this_rank, packs_of_step
from tests.peft_reference import ALPHA, RANK, TARGETS, Tensors
from tests.reference import small_config
from training.step import TrainStep, forward
from training.validation import evaluation

SEED = 11  # of the run


def make_trainer(
    variant: str,
    folder: str,
    layout: str,
    targets: str,
    adapters: str,
    recompute: str = "none",
    dropout: float = 0.0,
) -> TrainStep:
    """Build the model in a layout with the weights in `folder` and the adapters in the file `adapters`."""
    parallel, stages = layout_of(layout)
    initialize_model_parallel(parallel, seed=1)
    chunks = build_model_chunks(
        small_config(variant), parallel, pipeline_layout=stages, recompute=RecomputeConfig(recompute, recompute)
    )
    load_weights(chunks, SafetensorsFolder(folder))
    for chunk in chunks:
        add_adapters(chunk, LoraConfig(RANK, ALPHA, dropout, TARGETS[targets][0]), seed=SEED)
    fill_adapters(chunks, Tensors(torch.load(adapters, weights_only=True)))
    return TrainStep([chunk.train() for chunk in chunks], OPTIMIZER, 3, SEQ_LENGTH)


def gradients(
    variant: str,
    folder: str,
    layout: str,
    targets: str,
    adapters: str,
    expected: str,
    recompute: str = "none",
    dropout: float = 0.0,
) -> dict[str, Any]:
    """Compare the gradients of the first step with those in the file `expected`.

    Returns:
        The loss, and for every factor the summed squares of the difference and of the expected gradient.
    """
    trainer = make_trainer(variant, folder, layout, targets, adapters, recompute, dropout)
    chunks: Any = trainer.model_chunks
    # Give every rank whole gradients; the distributed optimizer would leave it a part of them.
    true_schedule = training.step.get_forward_backward_func
    training.step.get_forward_backward_func = lambda: partial(get_forward_backward_func(), force_all_reduce=True)
    try:
        packs = packs_of_step(variant, 1)
        numbers = of_this_rank([PackNumber(1, number) for number in range(len(packs))])
        loss, _ = trainer.measure(of_this_rank(packs), lambda *_: None, numbers)
    finally:
        training.step.get_forward_backward_func = true_schedule
    found = {id(p): p.main_grad.clone() for chunk in chunks for p in chunk.parameters() if p.requires_grad}
    fill_adapters(chunks, Tensors(torch.load(expected, weights_only=True)))
    differences = {}
    for _, adapter in (named for chunk in chunks for named in adapters_of(chunk)):
        for factor in adapter.factors:
            want: Any = adapter.get_parameter(factor)
            differences[f"{adapter.site.adapter}.{factor}"] = squares(found.pop(id(want)), want)
    assert not found, "something else than adapters is trained"
    return {"loss": loss, "differences": differences}


def squares(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the summed squares of a difference and of what is expected."""
    expected = expected.detach().double()
    return (found.double() - expected).square().sum().item(), expected.square().sum().item()


def train(
    variant: str,
    folder: str,
    layout: str,
    targets: str,
    adapters: str,
    steps: int = 3,
    dropout: float = 0.0,
) -> list[dict[str, Any]]:
    """Train and return the report of each step."""
    trainer = make_trainer(variant, folder, layout, targets, adapters, dropout=dropout)
    return [vars(trainer.run(step, of_this_rank(packs_of_step(variant, step)))) for step in range(1, steps + 1)]


def continue_run(
    variant: str,
    folder: str,
    layout: str,
    targets: str,
    adapters: str,
    dropout: float,
    steps: Sequence[int],
    load_from: str = "",
    checkpoint: str = "",
    save_at: int = 0,
) -> dict[str, Any]:
    """Evaluate, then train some steps, from the start or from a checkpoint.

    Returns:
        This rank's losses of its first pack in the evaluation, the report of each step, and the adapters at the end.
    """
    trainer = make_trainer(variant, folder, layout, targets, adapters, dropout=dropout)
    if load_from:
        load_checkpoint(Path(load_from), trainer.model_chunks, trainer.optimizer)
    with evaluation(trainer):
        held_out = forward(trainer.ddp[0], of_this_rank(packs_of_step(variant, 9))[0])
    reports = []
    for step in steps:
        reports.append(vars(trainer.run(step, of_this_rank(packs_of_step(variant, step)))))
        if step == save_at:
            state = TrainState(step=step)
            chunks, optimizer = trainer.model_chunks, trainer.optimizer
            save_checkpoint(Path(checkpoint), chunks, hf_files=lambda _: None, optimizer=optimizer, train_state=state)
    trainer.synchronize_weights()
    trained = [p.detach().clone() for chunk in trainer.model_chunks for p in chunk.parameters() if p.requires_grad]
    return {"held out": held_out.tolist(), "reports": reports, "adapters": [p.tolist() for p in trained]}
