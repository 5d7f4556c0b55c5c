"""Emulated FP8 against Transformer Engine's kernels: the same rounded values, and products near enough."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.fp8 import Fp8Config
from model.fp8_emulation import RoundedProduct, Rounding
from model.fp8_rounding import round_operand
from model.installed import has_transformer_engine

RECIPES = ("tensorwise", "blockwise", "mxfp8")
PRODUCTS = 5e-3  # relative, by norm: the results are bfloat16, and tensor cores add with fewer bits than float32
ROUNDING = 2e-2  # at least: what FP8 itself changes


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    if not has_transformer_engine():
        pytest.skip("needs Transformer Engine")
    import transformer_engine.pytorch as te

    available = {"tensorwise": te.is_fp8_available, "blockwise": te.is_fp8_block_scaling_available}
    if not available.get(request.param, te.is_mxfp8_available)():
        pytest.skip(f"this GPU or CUDA version does not compute {request.param}")
    return str(request.param)


def quantizer(recipe: str, role: str) -> Any:
    """Return Transformer Engine's quantizer of an operand, along its rows."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    if recipe == "tensorwise":
        dtype = tex.DType.kFloat8E5M2 if role == "gradient" else tex.DType.kFloat8E4M3
        return Float8CurrentScalingQuantizer(dtype, device=torch.device("cuda"))
    if recipe == "blockwise":
        dimensions = 2 if role == "weight" else 1
        return Float8BlockQuantizer(tex.DType.kFloat8E4M3, rowwise=True, columnwise=False, block_scaling_dim=dimensions)
    return MXFP8Quantizer(tex.DType.kFloat8E4M3, rowwise=True, columnwise=False)


@pytest.mark.parametrize("role", ["input", "weight", "gradient"])
def test_values_are_rounded_as_by_the_kernels(recipe: str, role: str) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    operand = torch.randn(256, 512, device="cuda", generator=generator)
    operand *= torch.logspace(-4, 2, 512, device="cuda")
    operand[:, :32] = 0
    theirs = quantizer(recipe, role)(operand).dequantize()
    assert torch.equal(round_operand(Fp8Config(recipe=recipe), role, operand, summed=1), theirs.float())


def test_linear_layers_compute_as_the_kernels(recipe: str) -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as te_recipes

    kinds = {
        "tensorwise": te_recipes.Float8CurrentScaling,
        "blockwise": te_recipes.Float8BlockScaling,
        "mxfp8": te_recipes.MXFP8BlockScaling,
    }
    generator = torch.Generator("cuda").manual_seed(2)
    x, g = (torch.randn(256, n, device="cuda", generator=generator, dtype=torch.bfloat16) for n in (512, 384))
    layer: Any = te.Linear(512, 384, bias=False, params_dtype=torch.bfloat16, device="cuda")

    def gradients(compute: Any) -> list[torch.Tensor]:
        own: Any = x.clone().requires_grad_()
        layer.weight.grad = None
        y = compute(own)
        y.backward(g)
        return [y.detach().float(), own.grad.float(), layer.weight.grad.float()]

    def kernels(own: torch.Tensor) -> torch.Tensor:
        with te.fp8_autocast(enabled=True, fp8_recipe=kinds[recipe]()):
            return layer(own)

    rounding = Rounding(Fp8Config(recipe=recipe), None)
    theirs = gradients(kernels)
    ours = gradients(lambda own: RoundedProduct.apply(own, layer.weight, None, rounding))
    exact = gradients(lambda own: torch.nn.functional.linear(own, layer.weight))
    for kernel, emulated, unrounded in zip(theirs, ours, exact, strict=True):
        assert (emulated - kernel).norm() <= PRODUCTS * kernel.norm()
        assert (unrounded - kernel).norm() >= ROUNDING * kernel.norm()
