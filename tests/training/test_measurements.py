"""What a run measures: parts of the gradient norm, loads by modality, FLOPs, times, tokens in all, the profiler."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model.flops import FORWARD_AND_BACKWARD, adapter_cost, decoder_cost, tower_cost
from model.glmv import GlmvModel
from tests.launch import fail, metrics, train
from tests.model.layout_cases import OPTIMIZER, SEQ_LENGTH, packs_of_step
from tests.reference import parameter_distance, small_config
from tests.training.test_parts import part_of_transformers
from training.metrics import duration, step_line
from training.step import TrainStep
from training.throughput import StepFlops, peak_of

PEAK = 0.5  # TFLOP/s, of a device that is not in the table
SAME = ("step", "loss", "grad_norm", "tokens", "samples", "images", "patches", "tokens_total", "dead_experts")


# --- gradient norms ---------------------------------------------------------------------------------------------------


def test_norms_of_the_parts_are_those_of_transformers(
    build: Callable[..., GlmvModel], reference: nn.Module, hf_folder: object
) -> None:
    from tests.model.layout_cases import samples_of_step
    from tests.reference import transformers_loss

    model = build().train()
    variant = model.glmv_config.variant
    report = TrainStep([model], OPTIMIZER, steps=1, seq_length=SEQ_LENGTH).run(1, packs_of_step(variant, 1))
    transformers_loss(reference, (sample for pack in samples_of_step(variant, 1) for sample in pack)).backward()
    squares: Counter[str] = Counter()
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            squares[part_of_transformers(name)] += parameter.grad.double().square().sum().item()
    assert report.part_norms == pytest.approx({part: math.sqrt(square) for part, square in squares.items()}, rel=1e-5)
    assert sum(norm**2 for norm in report.part_norms.values()) == pytest.approx(report.grad_norm**2, rel=1e-6)
