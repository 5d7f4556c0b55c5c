"""FP8 in the torch backend, emulated: the values are rounded as the recipe says, the products are computed in float32.

It is for studies of convergence and for tests of FP8 runs on machines without the hardware; it is slower than no FP8.
megatron-core's parallel linear layers stay as they are. Only their matrix products are replaced:

    y  = x w^T     x [tokens, in], w [out, in]     x and w rounded
    dx = g w       g [tokens, out]                 g and w rounded
    dw = g^T x                                     g and x rounded

Each process rounds the operands of its own products, as Transformer Engine does. Under tensor parallelism a scale of
`tensorwise` is that of the rank's part of a weight, and of an operand that is split; under sequence parallelism
operands are gathered first, and so have one scale. Biases and their gradients are not rounded.

What differs from the hardware: sums are in float32 throughout, where tensor cores keep fewer bits.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from model.fp8 import Fp8Config
from model.fp8_delayed import ROLES, DelayedScales
from model.fp8_rounding import number_format, round_operand


class RoundedProduct(torch.autograd.Function):
    """x w^T + bias with rounded operands, and its gradients with rounded operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rounding: Rounding) -> Tensor:
        """Return [..., out] of x [..., in] and weight [out, in]."""
        ctx.rounding = rounding
        ctx.save_for_backward(x, weight)
        rows = x.flatten(0, -2)
        y = rounding(rows, "input", summed=1) @ rounding(weight, "weight", summed=1).T
        if bias is not None:
            y += bias
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Return the gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        rounding, [gradient] = ctx.rounding, gradients
        rows = gradient.flatten(0, -2)
        rounding.observe("gradient", rows)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = rounding(rows, "gradient", summed=1) @ rounding(weight, "weight", summed=0)
            dx = dx.to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            dw = rounding(rows, "gradient", summed=0).T @ rounding(x.flatten(0, -2), "input", summed=0)
            dw = dw.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db, None


class Rounding:
    """Rounds the operands of one linear layer.

    Args:
        fp8: The recipe.
        scales: Of recipe delayed; None for the others.
    """

    def __init__(self, fp8: Fp8Config, scales: DelayedScales | None) -> None:
        self.fp8, self.scales = fp8, scales

    def __call__(self, operand: Tensor, role: str, *, summed: int) -> Tensor:
        """Return an operand [rows, columns] rounded, in float32; see `round_operand`."""
        scale = None if self.scales is None else self.scales.scale(role)
        return round_operand(self.fp8, role, operand, summed, scale)

    def observe(self, role: str, operand: Tensor) -> None:
        """Note the magnitude of an operand, which later scales follow from."""
        if self.scales is not None:
            self.scales.observe(role, operand)


class EmulatedLinear(nn.Module):
    """What replaces the matrix product of megatron-core's parallel linear layers.

    Attributes:
        fp8: The recipe; an attribute of the class.
        delayed_scales: Of recipe delayed; None for the others.
    """

    fp8: Fp8Config

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.delayed_scales: DelayedScales | None = None
        if self.fp8.recipe == "delayed":
            formats = [number_format(self.fp8, role) for role in ROLES]
            self.delayed_scales = DelayedScales(formats, torch.cuda.current_device())

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **_: Any,
    ) -> Tensor:
        """Compute the product of this rank, with megatron-core's arguments."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        rounding = Rounding(self.fp8, self.delayed_scales)
        if self.training and torch.is_grad_enabled():  # neither in validation nor before a layer is recomputed
            rounding.observe("input", input)
            rounding.observe("weight", weight)
        y: Tensor = RoundedProduct.apply(input, weight, bias, rounding)
        return y


class EmulatedColumnParallelLinear(EmulatedLinear, ColumnParallelLinear):
    """megatron-core's layer that splits a matrix by its rows, with a rounded product."""


class EmulatedRowParallelLinear(EmulatedLinear, RowParallelLinear):
    """megatron-core's layer that splits a matrix by its columns, with a rounded product."""


def emulated_linear_layers(fp8: Fp8Config) -> tuple[type, type]:
    """Return the classes of linear layers that split a matrix by its rows, and by its columns.

    Args:
        fp8: The recipe, not none.
    """
    column = type("Fp8ColumnParallelLinear", (EmulatedColumnParallelLinear,), {"fp8": fp8})
    row = type("Fp8RowParallelLinear", (EmulatedRowParallelLinear,), {"fp8": fp8})
    return column, row
