"""Functions that the processes of the recompute tests run: one step with and without recompute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.glmv import build_model_chunks
from model.parallel import ParallelConfig
from model.process_groups import initialize_model_parallel
from model.recompute import RecomputeConfig
from model.weights.load import SafetensorsFolder, load_weights
from tests.model.layout_cases import (
    OPTIMIZER,
    SEQ_LENGTH,
    canonical_parameters,
    layout_of,
    of_this_rank,
    packs_of_step,
)
from tests.reference import small_config
from training.step import StepReport, TrainStep


@dataclass
class Step:
    """What one step computed."""

    report: StepReport
    gradients: dict[str, Tensor]  # by the name in the whole model
    expert_tokens: list[Tensor]  # tokens of each expert, counted by each router
    expert_biases: list[Tensor]  # of each router, after the step


def one_step(
    variant: str,
    folder: Path,
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """Train one step with large balance losses."""
    coefficients: dict[str, Any] = {"balance_loss_coeff": 0.5, "expert_bias_update_rate": 1e-3}
    chunks = build_model_chunks(small_config(variant), parallel, dtype=dtype, recompute=recompute, **coefficients)
    load_weights(chunks, SafetensorsFolder(folder))
    trainer = TrainStep([chunk.train() for chunk in chunks], OPTIMIZER, 1, SEQ_LENGTH)
    routers = [router for chunk in chunks for router in chunk.routers()]
    finalize = chunks[0].config.finalize_model_grads_func
    counted: list[Tensor] = []
    gradients: dict[str, Tensor] = {}

    def keep(*args: Any, **kwargs: Any) -> None:
        counted.extend(router.local_tokens_per_expert.clone() for router in routers)
        finalize(*args, **kwargs)
        for chunk in chunks:
            gradients.update({name: p.main_grad.clone() for name, p in canonical_parameters(chunk).items()})

    for chunk in chunks:
        chunk.config.finalize_model_grads_func = keep
    report = trainer.run(1, of_this_rank(packs_of_step(variant, 1)))
    return Step(report, gradients, counted, [router.expert_bias.clone() for router in routers])


def compare(variant: str, folder: str, layout: str, recompute: str) -> dict[str, Any]:
    """Compare a step with `recompute` and one without, both in `layout`."""
    parallel, _ = layout_of(layout)
    initialize_model_parallel(parallel, seed=1)
    without, with_ = (
        one_step(variant, Path(folder), parallel, RecomputeConfig(choice, choice)) for choice in ("none", recompute)
    )
    return differences(without, with_)


def differences(expected: Step, found: Step) -> dict[str, Any]:
    """Return the largest difference of a gradient, relative by tensor norm, both reports, and what else is equal."""
    assert expected.gradients.keys() == found.gradients.keys()
    return {
        "gradients": max(
            ((found.gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)).item()
            for name, gradient in expected.gradients.items()
        ),
        "reports": (vars(expected.report), vars(found.report)),
        "expert tokens": all_equal(expected.expert_tokens, found.expert_tokens),
        "expert biases": all_equal(expected.expert_biases, found.expert_biases),
    }


def all_equal(expected: list[Tensor], found: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
