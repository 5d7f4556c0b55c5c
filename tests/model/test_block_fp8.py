"""Weights in block FP8 are those of the engines' own quantiser, whatever rows are asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, FP8Experts, FP8Linear, replace_with_fp8_linear

from model.config import GlmvConfig
from model.errors import WeightsError
from model.weights.formats.block_fp8 import (
    SCALE,
    BlockQuantised,
    converted_names,
    plain_blocks,
    quantization_config,
)
from model.weights.formats.opened import open_folder
from model.weights.source import whole
from model.weights.table import hf_shapes
from tests.peft_reference import Tensors
from tests.reference import small_config, transformers_model

NAME = "model.language_model.layers.0.self_attn.q_proj.weight"
SHAPES = [(256, 384), (300, 200), (1, 5), (1500, 130)]


class InMemory(Tensors):
    """Matrices in memory; the most values that were asked for at a time are in `largest`."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__(tensors)
        self.largest = 0

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = super().rows(name, start, stop)
        self.largest = max(self.largest, rows.numel())
        return rows


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return values of many magnitudes: rows of a weight, rows with outliers, small values and a block of zeros."""
    generator = torch.Generator().manual_seed(shape[0])
    values = torch.randn(shape, generator=generator) * 0.02
    values *= 10 ** (torch.rand(shape, generator=generator) * 6 - 4)
    values[128:200, :128] = 0
    values[200:256, :128] *= 1e-6
    return values.to(dtype)


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise as `per_block_cast_to_fp8` of vLLM 0.32.0 (vllm/utils/deep_gemm.py), which is DeepGEMM's."""
    m, n = x.shape
    padded = torch.zeros(-(-m // 128) * 128, -(-n // 128) * 128, dtype=x.dtype)
    padded[:m, :n] = x
    view = padded.view(-1, 128, padded.size(1) // 128, 128)
    amax = view.abs().float().amax(dim=(1, 3), keepdim=True).clamp(1e-4)
    sf = amax / 448.0
    scaled = (view * (1.0 / sf)).to(torch.float8_e4m3fn)
    return scaled.view_as(padded)[:m, :n].contiguous(), sf.view(view.size(0), view.size(2))


def expanded(scales: Tensor, shape: torch.Size) -> Tensor:
    return scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_the_engines_quantiser(shape: tuple[int, int], dtype: torch.dtype) -> None:
    given = matrix(shape, dtype)
    source = BlockQuantised(InMemory(x=given, bias=given[0]), ["x"])
    values, scales = reference(given)
    assert source.names() == ["x", f"x{SCALE}", "bias"]
    assert torch.equal(whole(source, "x").view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(whole(source, f"x{SCALE}"), scales)
    assert torch.equal(whole(source, "bias"), given[0])
    assert [source.dtype(name) for name in source.names()] == [torch.float8_e4m3fn, torch.float32, dtype]
    assert [source.shape(name) for name in source.names()] == [shape, tuple(scales.shape), (shape[1],)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_have_the_same_bits_however_many_are_asked_for(shape: tuple[int, int]) -> None:
    source = BlockQuantised(InMemory(x=matrix(shape)), ["x"])
    for name, sizes in (("x", (1, 37, 128, 200, 1024)), (f"x{SCALE}", (1, 2, 3))):
        expected = whole(source, name)
        for size in sizes if shape[0] < 1000 else sizes[2:]:
            starts = range(0, source.shape(name)[0], size)
            rows = [source.rows(name, start, min(start + size, source.shape(name)[0])) for start in starts]
            assert torch.equal(torch.cat(rows).view(torch.uint8), expected.view(torch.uint8)), (name, size)


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_that_of_three_bits(shape: tuple[int, int]) -> None:
    """Half of the last bit: 2 ** -4 of a value, and below the smallest normal number 2 ** -10 of the scale."""
    given = matrix(shape)
    source = BlockQuantised(InMemory(x=given), ["x"])
    scales = expanded(whole(source, f"x{SCALE}"), given.shape).double()
    error = (whole(source, "x").double() * scales - given.double()).abs()
    bound = torch.maximum(given.double().abs() * 2**-4, scales * 2**-10)
    assert (error <= bound * (1 + 2**-20)).all()
    assert (error > bound / 2).any()


def test_few_rows_are_read_at_a_time() -> None:
    memory = InMemory(x=torch.ones(20_000, 1000))
    source = BlockQuantised(memory, ["x"])
    whole(source, "x")
    whole(source, f"x{SCALE}")
    assert memory.largest <= 2**19


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    given = matrix((256, 384))
    given[200, 300] = value
    source = BlockQuantised(InMemory(x=given), ["x"])
    for name in source.names():
        with pytest.raises(WeightsError, match="memory: tensor x has values that are not finite"):
            whole(source, name)


def test_readers_give_the_products(tmp_path: Path) -> None:
    """This project's and transformers', which takes whole blocks alone."""
    given = matrix((256, 384))
    values, scales = reference(given)
    source = BlockQuantised(InMemory(**{NAME: given, "norm": given[0].clone()}), [NAME])
    save_file({name: whole(source, name) for name in source.names()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    read, read_as = open_folder(tmp_path)
    assert read_as == ("FP8, block scales 128x128 (1)",)
    product = (values.float() * expanded(scales, values.shape)).to(torch.bfloat16)
    assert torch.equal(whole(read, NAME), product)
    theirs: Any = Fp8Dequantize(None)
    assert torch.equal(theirs._dequantize_one(values, scales, torch.bfloat16), product)


# --- what is converted ------------------------------------------------------------------------------------------------


def test_published_models() -> None:
    """All of GLM-4.1V's decoder; of GLM-4.5V's not the first MLP, whose width of 10,944 is 85.5 blocks."""
    moe, dense = (hf_shapes(GlmvConfig.from_preset(preset)) for preset in ("glm45v", "glm41v_9b"))
    assert plain_blocks(moe) == ["model.language_model.layers.0.mlp"]
    assert len(converted_names(moe)) == 46 * 4 + 45 * (128 + 1) * 3
    assert plain_blocks(dense) == []
    assert len(converted_names(dense)) == 40 * (4 + 2)
    for shapes in (moe, dense):
        for name in converted_names(shapes):
            assert all(size % 128 == 0 for size in shapes[name])
            assert not any(word in name for word in ("visual", "norm", "bias", "embed", "lm_head", "gate.weight"))


def convertible(hf_type: str) -> GlmvConfig:
    """Return a small model of which one MLP, of the mixture of experts, does not fit blocks, as in GLM-4.5V."""
    config = small_config(hf_type)
    sizes: dict[str, Any] = {"moe_intermediate_size": 256} if config.decoder.is_moe else {"intermediate_size": 384}
    return replace(config, decoder=replace(config.decoder, **sizes))


@pytest.mark.parametrize("hf_type", ["glm4v_moe", "glm4v"])
@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_transformers_converts_the_same_modules(hf_type: str, key: str) -> None:
    """With the list in config.json, transformers makes FP8 layers of exactly what the export has scales for."""
    config = convertible(hf_type)
    shapes = hf_shapes(config)
    content = quantization_config(shapes)
    quantised = FineGrainedFP8Config(**{name: value for name, value in content.items() if name in ("fmt", key)})
    model: Any = transformers_model(config)
    replace_with_fp8_linear(model, quantised.modules_to_not_convert, quantised)
    layers = {name for name, module in model.named_modules() if isinstance(module, (FP8Linear, FP8Experts))}
    expected = {name.removesuffix(".weight").split(".experts.")[0] for name in converted_names(shapes)}
    if config.decoder.is_moe:
        assert "model.language_model.layers.1.mlp.shared_experts.up_proj" in expected
        assert "model.language_model.layers.0.mlp.up_proj" not in expected
    assert {name.removesuffix(".experts") for name in layers} == expected


def test_fused_gate_and_up_are_blocks_of_their_own() -> None:
    """A width of 192 would make 3 blocks of the fused matrix, of which the second has rows of both."""
    config = small_config("glm4v")
    for width, plain in ((192, 4), (256, 0)):
        shapes = hf_shapes(replace(config, decoder=replace(config.decoder, intermediate_size=width)))
        assert len(plain_blocks(shapes)) == plain, width
