"""Rounding to FP8 against the definition of the formats: 256 codes decoded bit by bit, and the nearest one searched.

The scales of the recipes are computed here with exact fractions, value by value.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from fractions import Fraction
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from model.fp8 import Fp8Config
from model.fp8_rounding import E4M3, E5M2, NumberFormat, round_operand, round_to

pytestmark = pytest.mark.fast

BITS = {E4M3: (4, 3, 7), E5M2: (5, 2, 15)}  # of exponent and mantissa, and the bias
DTYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


def decode(form: NumberFormat, code: int) -> Fraction | None:
    """Return the number that a code stands for (OCP 8-bit floating point, 1.0); None for NaN and infinity."""
    exponent_bits, mantissa_bits, bias = BITS[form]
    sign = -1 if code >> 7 else 1
    exponent, mantissa = (code >> mantissa_bits) & (2**exponent_bits - 1), code & (2**mantissa_bits - 1)
    if form is E5M2 and exponent == 31:
        return None
    if form is E4M3 and exponent == 15 and mantissa == 7:
        return None
    if exponent == 0:
        return sign * Fraction(mantissa, 2**mantissa_bits) * Fraction(2) ** (1 - bias)
    return sign * (1 + Fraction(mantissa, 2**mantissa_bits)) * Fraction(2) ** (exponent - bias)


@cache
def codes(form: NumberFormat) -> list[tuple[Fraction, int]]:
    """Return the format's numbers, in order, with their codes; zero once."""
    decoded = {number: code for code in range(256) if (number := decode(form, code)) is not None}
    return sorted(decoded.items())


def nearest(form: NumberFormat, value: Fraction) -> Fraction:
    """Return the number of the format that is nearest; of two, that with an even code."""
    place = bisect_left(codes(form), (value, -1))
    neighbours = codes(form)[max(place - 1, 0) : place + 1]
    return min(neighbours, key=lambda pair: (abs(pair[0] - value), pair[1] % 2))[0]


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_the_formats_numbers_stay_and_what_is_between_goes_to_the_nearest(form: NumberFormat) -> None:
    exact = [number for number, _ in codes(form)]
    shares = (Fraction(1, 2), Fraction(33, 64), Fraction(31, 64))
    between = [low + (high - low) * share for low, high in pairwise(exact) for share in shares]
    outside = [exact[0] * 2, exact[-1] * 2, exact[-1] + 1, Fraction(2) ** 100]
    given = [*exact, *between, *outside]
    rounded = round_to(form, torch.tensor([float(value) for value in given]))
    assert rounded.tolist() == [float(nearest(form, value)) for value in given]


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_rounding_is_that_of_torchs_cast(form: NumberFormat) -> None:
    values = torch.randn(20000, generator=torch.Generator().manual_seed(1)).exp2() * 2.0 ** torch.linspace(
        -20, 14, 20000
    )
    values = (values * torch.tensor([1, -1]).repeat(10000)).clamp(-form.largest, form.largest)
    assert torch.equal(round_to(form, values), values.to(DTYPES[form]).float())


def test_infinity_becomes_the_largest_number_and_nan_stays() -> None:
    rounded = round_to(E5M2, torch.tensor([math.inf, -math.inf, math.nan, -0.0]))
    assert rounded[:2].tolist() == [57344.0, -57344.0]
    assert rounded[2].isnan()
    assert rounded[3] == 0


# --- scales -----------------------------------------------------------------------------------------------------------


def float32(value: Fraction) -> Fraction:
    """Return the nearest float32."""
    return Fraction(torch.tensor(float(value)).item())


def brute_force(recipe: str, form: NumberFormat, tile: Tensor) -> Tensor:
    """Return values that share a scale, rounded one by one."""
    values = [Fraction(value) for value in tile.flatten().tolist()]
    amax = max(abs(value) for value in values)
    if amax == 0:
        return torch.zeros_like(tile)
    largest = Fraction(form.largest)
    if recipe == "tensorwise":  # the scale is a float32
        scale = float32(largest / amax)
        inverse = float32(1 / scale)
        rounded = [nearest(form, float32(value * scale)) * inverse for value in values]
        return torch.tensor([float(value) for value in rounded]).view_as(tile)
    power = Fraction(1)
    if recipe == "blockwise":  # the largest power of two that does not overflow
        while power * 2 * amax <= largest:
            power *= 2
        while power * amax > largest:
            power /= 2
    else:  # mxfp8: the smallest power of two that is not below amax / largest, and its reciprocal
        while power < amax / largest:
            power *= 2
        while power / 2 >= amax / largest:
            power /= 2
        power = 1 / power
    return torch.tensor([float(nearest(form, value * power) / power) for value in values]).view_as(tile)


def tiles_of(recipe: str, role: str, summed: int) -> tuple[int, int]:
    if recipe == "tensorwise":
        return 10**9, 10**9
    length = {"blockwise": 128, "mxfp8": 32}[recipe]
    if recipe == "blockwise" and role == "weight":
        return length, length
    return (1, length) if summed == 1 else (length, 1)


@pytest.mark.parametrize("summed", [0, 1])
@pytest.mark.parametrize("role", ["input", "weight", "gradient"])
@pytest.mark.parametrize(("recipe", "form"), [("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3"),
                                              ("mxfp8", "hybrid")])  # fmt: skip
def test_every_recipe_against_brute_force(recipe: str, form: str, role: str, summed: int) -> None:
    # Sizes that end within a tile, rows and columns of different magnitudes, zeros, and a tile of zeros.
    generator = torch.Generator().manual_seed(7)
    rows, columns = (4, 140) if summed == 1 else (140, 4)
    operand = torch.randn(rows, columns, generator=generator)
    operand *= torch.logspace(-3, 2, rows)[:, None] * torch.logspace(1, -2, columns)[None]
    operand[0, 0] = operand[-1, -1] = 0.0
    if summed == 1:
        operand[1, :32] = 0.0
    chosen = E5M2 if form == "hybrid" and role == "gradient" else E4M3
    height, width = tiles_of(recipe, role, summed)
    expected = torch.empty_like(operand)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            part = (slice(top, top + height), slice(left, left + width))
            expected[part] = brute_force(recipe, chosen, operand[part])
    rounded = round_operand(Fp8Config(recipe=recipe, format=form), role, operand, summed)
    assert torch.equal(rounded, expected)


def test_tensorwise_is_what_torchs_fp8_product_computes() -> None:
    """torch._scaled_mm multiplies codes with the two scales, in its own kernel."""
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(32, 64, generator=generator), torch.randn(48, 64, generator=generator)
    scales = [448 / x.abs().max(), 448 / w.abs().max()]
    codes = [(value * scale).to(torch.float8_e4m3fn) for value, scale in zip((x, w), scales, strict=True)]
    theirs = torch._scaled_mm(
        codes[0], codes[1].T, scale_a=1 / scales[0], scale_b=1 / scales[1], out_dtype=torch.float32
    )
    fp8 = Fp8Config(recipe="tensorwise")
    ours = round_operand(fp8, "input", x, 1) @ round_operand(fp8, "weight", w, 1).T
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_magnitudes_at_the_ends_of_float32() -> None:
    """A block of the smallest numbers becomes zeros under mxfp8, as in Transformer Engine; the others keep it."""
    operand = torch.zeros(2, 64)
    operand[0, 0], operand[1, 32] = 1e-45, 2e38
    for recipe in ("tensorwise", "blockwise", "mxfp8"):
        rounded = round_operand(Fp8Config(recipe=recipe), "input", operand, 1)
        assert rounded.isfinite().all()
        assert rounded[1, 32] == pytest.approx(operand[1, 32].item(), rel=2**-4)


def test_bfloat16_is_rounded_from_its_own_values() -> None:
    operand = torch.randn(8, 64, generator=torch.Generator().manual_seed(5), dtype=torch.bfloat16)
    fp8 = Fp8Config(recipe="mxfp8")
    assert torch.equal(round_operand(fp8, "input", operand, 1), round_operand(fp8, "input", operand.float(), 1))


def test_an_expert_without_tokens() -> None:
    assert round_operand(Fp8Config(recipe="blockwise"), "input", torch.empty(0, 64), 1).shape == (0, 64)
