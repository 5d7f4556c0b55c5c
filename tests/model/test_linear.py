"""Experts' linear layers against torch's grouped product, what is dispatched to experts, and what one rank skips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from model.glmv import GlmvModel
from model.linear import GroupedProduct
from model.megatron_versions import SORTS_ANY_NUMBER
from tests.model.layout_cases import OPTIMIZER, SEQ_LENGTH, packs_of_step
from tests.reference import forward_inputs
from training.step import TrainStep

pytestmark = pytest.mark.fast

COUNTS = [3, 0, 8, 1, 0]
ROWS, WIDTH = 8, 16  # torch wants rows of a multiple of 16 bytes


def random_case(dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return tokens that are sorted by expert, weights, and the gradient of their product."""
    generator, tokens = torch.Generator().manual_seed(3), sum(COUNTS)
    shapes = [(tokens, WIDTH), (tokens, ROWS), *[(ROWS, WIDTH)] * len(COUNTS)]
    x, gradient, *weights = (
        torch.randn(shape, generator=generator).to(torch.cuda.current_device(), dtype) for shape in shapes
    )
    return x.requires_grad_(), [weight.requires_grad_() for weight in weights], gradient


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_product_and_gradients_equal_torch(dtype: torch.dtype, tolerance: float) -> None:
    x, weights, gradient = random_case(dtype)
    ends = torch.tensor(COUNTS, device=x.device).cumsum(0, dtype=torch.int32)
    expected = F.grouped_mm(x, torch.stack(weights).transpose(1, 2), offs=ends)
    expected_gradients = torch.autograd.grad(expected, [x, *weights], gradient)

    found = GroupedProduct.apply(x, COUNTS, *weights)
    found_gradients = torch.autograd.grad(found, [x, *weights], gradient)
    for one, other in zip((found, *found_gradients), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_added_to_a_buffer_of_their_dtype(dtype: torch.dtype) -> None:
    x, weights, gradient = random_case(dtype)
    expected = torch.autograd.grad(GroupedProduct.apply(x, COUNTS, *weights), weights, gradient)
    for weight in weights:
        buffered: Any = weight
        buffered.main_grad = torch.ones_like(weight, dtype=torch.float32)  # as DDP's buffers are
    for _ in range(2):
        for weight, passed in zip(
            weights, torch.autograd.grad(GroupedProduct.apply(x, COUNTS, *weights), weights, gradient), strict=True
        ):
            buffered = weight
            if not getattr(buffered, "grad_added_to_main_grad", False):
                buffered.main_grad += passed  # as DDP does
    for weight, once in zip(weights, expected, strict=True):
        buffered = weight
        assert getattr(buffered, "grad_added_to_main_grad", False) == (dtype == torch.float32)
        torch.testing.assert_close(buffered.main_grad, 1 + 2 * once.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("hf_folder", ["glm4v_moe"], indirect=True)
def test_padding_is_not_dispatched(build: Callable[..., GlmvModel]) -> None:
    """Since 0.17 megatron-core sorts a number of rows that it knows before, in which padding counts."""
    model = build().train()
    experts = [layer.mlp.experts for layer in model.language_model.decoder.layers if hasattr(layer.mlp, "experts")]
    rows: list[int] = []
    for module in experts:
        module.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    batch = packs_of_step("glm4v_moe", 1)[0]
    assert batch.num_tokens < SEQ_LENGTH
    model(**forward_inputs(batch))
    dispatched = batch.num_tokens if SORTS_ANY_NUMBER else SEQ_LENGTH
    assert rows == [dispatched * 2] * len(experts)  # two experts per token


def test_one_rank_does_not_communicate(build: Callable[..., GlmvModel]) -> None:
    """Not even with itself: gloo would copy gradients and weights twice."""
    model = build().train()
    trainer = TrainStep([model], OPTIMIZER, steps=3, seq_length=SEQ_LENGTH)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        trainer.run(1, packs_of_step(model.glmv_config.variant, 1))
    names = {event.key for event in recorded.key_averages()}
    assert "aten::mm" in names
    assert not [name for name in names if name.startswith(("c10d::", "gloo:"))]
