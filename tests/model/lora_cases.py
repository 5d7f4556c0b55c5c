"""Functions that the processes of the LoRA tests run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

import training.step
from model.glmv import build_model_chunks
from model.hf_weights import SafetensorsFolder, load_weights
from model.lora import add_adapters
from model.lora_dropout import PackNumber
from model.lora_layers import adapters_of
from model.lora_targets import LoraConfig
from model.lora_weights import fill_adapters
from model.parallel import initialize_model_parallel
from model.recompute import RecomputeConfig
from tests.model.layout_cases import OPTIMIZER, SEQ_LENGTH, layout_of, of_this_rank, packs_of_step
from tests.peft_reference import ALPHA, RANK, TARGETS, Tensors
from tests.reference import small_config
from training.step import TrainStep

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
