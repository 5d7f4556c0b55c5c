"""Round the operands of a matrix product to FP8 and back, with the scales of each recipe.

An operand is multiplied by a scale that brings its largest magnitude (amax) near the largest number of the format, is
rounded to the format, to even where two numbers are equally near, and divided by the scale again. Values beyond the
largest number become that number; NaN stays NaN. Recipes differ in which values share a scale, and in how it is made:

    tensorwise   the whole operand     largest / amax
    delayed      the whole operand     from earlier maxima (model.fp8_delayed)
    blockwise    1 x 128 values along the summed dimension; 128 x 128 of weights    largest / amax, down to a power of 2
    mxfp8        1 x 32 values along the summed dimension                           amax / largest, up to a power of 2

These are Transformer Engine's definitions: its `compute_scale_from_amax` and `float_to_e8m0`, and its defaults, with
powers of two for blockwise and no smallest amax. In a linear layer y = x w^T, with x [tokens, in] and w [out, in], the
summed dimension of x is `in` for y and `tokens` for the weight's gradient. So x, w and the gradient of y are rounded
twice, from the original values, except where the scale is that of the whole operand or of a square.

In formats `hybrid`, gradients are E5M2 and all else E4M3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8 import Fp8Config

FLOAT32_EXPONENT = 0x7F800000  # the bits of a float32's exponent


@dataclass(frozen=True)
class NumberFormat:
    """A format of 8 bits: a sign, an exponent and a mantissa, with subnormal numbers."""

    largest: float
    mantissa_bits: int
    smallest_exponent: int  # of a normal number


E4M3 = NumberFormat(448.0, 3, -6)
E5M2 = NumberFormat(57344.0, 2, -14)

# Rows and columns of the values that share a scale, where the columns are summed over: of weights, and of the others.
TILES = {"blockwise": ((128, 128), (1, 128)), "mxfp8": ((1, 32), (1, 32))}


def number_format(fp8: Fp8Config, role: str) -> NumberFormat:
    """Return the format of an operand: input, weight or gradient."""
    return E5M2 if role == "gradient" and fp8.number_format == "hybrid" else E4M3


def round_operand(fp8: Fp8Config, role: str, operand: Tensor, summed: int, scale: Tensor | None = None) -> Tensor:
    """Return an operand of a matrix product as it is in FP8.

    Args:
        fp8: The recipe, not none.
        role: input, weight or gradient.
        operand: [rows, columns], float32 or bfloat16.
        summed: The dimension that the product sums over, 0 or 1.
        scale: The factor of recipe delayed, float32 [].

    Returns:
        float32 [rows, columns].
    """
    values, form = operand.float(), number_format(fp8, role)
    if not values.numel():
        return values
    if scale is None and fp8.recipe == "tensorwise":
        scale = largest_scale(form, values.abs().amax())
    if scale is not None:
        return round_to(form, values * scale).mul_(scale.reciprocal())
    of_weights, of_others = TILES[fp8.recipe]
    tile = of_weights if role == "weight" else of_others
    return _round_tiles(form, values, tile if summed == 1 else tile[::-1], is_mx=fp8.recipe == "mxfp8")


def round_to(form: NumberFormat, values: Tensor) -> Tensor:
    """Round float32 values to the nearest numbers of a format.

    >>> round_to(E4M3, torch.tensor([17.0, 1000.0]))
    tensor([ 16., 448.])
    """
    values = values.clamp(-form.largest, form.largest)
    # The exponent of each value, as a power of two, and from it the distance of neighbours in the format.
    power = (values.view(torch.int32) & FLOAT32_EXPONENT).view(torch.float32)
    step = power.clamp_(min=2.0**form.smallest_exponent).mul_(2.0**-form.mantissa_bits)
    return values.div_(step).round_().mul_(step)


def largest_scale(form: NumberFormat, amax: Tensor) -> Tensor:
    """Return the scale that maps `amax` to the largest number of a format; 1 where there is nothing to scale."""
    scale = (form.largest / amax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(amax.isfinite() & (amax > 0), scale, 1.0)


def _round_tiles(form: NumberFormat, values: Tensor, tile: tuple[int, int], is_mx: bool) -> Tensor:
    """Round with a scale for each tile; those at the end may be smaller."""
    rows, columns = values.shape
    padding = (0, -columns % tile[1], 0, -rows % tile[0])
    tiles = F.pad(values, padding).unflatten(0, (-1, tile[0])).unflatten(2, (-1, tile[1]))
    amax = tiles.abs().amax((1, 3), keepdim=True)
    scale, inverse = _mx_scale(form, amax) if is_mx else _power_of_two(largest_scale(form, amax))
    rounded = round_to(form, tiles * scale).mul_(inverse)
    return rounded.flatten(2, 3).flatten(0, 1)[:rows, :columns]


def _power_of_two(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the power of two that is not above `scale`, and its reciprocal."""
    scale = (scale.view(torch.int32) & FLOAT32_EXPONENT).view(torch.float32)
    return scale, scale.reciprocal()


def _mx_scale(form: NumberFormat, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factor of a block and its reciprocal, a power of two in 8 bits of exponent (E8M0).

    The reciprocal is amax / largest, rounded up to a power of two. As in Transformer Engine, the exponent 0 stands for
    blocks of zeros, whose factor is 1, and infinity becomes the largest exponent.
    """
    bits = (amax * (1.0 / form.largest)).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    rounds_up = (mantissa > 0) & (exponent < 254) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = torch.where(amax.isinf(), 254, exponent + rounds_up)
    scale = torch.where(exponent == 0, 1.0, ((254 - exponent) << 23).view(torch.float32))
    return scale, (exponent << 23).view(torch.float32)
