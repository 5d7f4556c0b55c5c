"""FP8 with Transformer Engine's modules as built: parameters, checkpoints, and which products are computed in FP8."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import is_float8tensor
from torch import nn
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from model.backend import Backend, TorchSpecProvider
from model.config import GlmvConfig
from model.fp8 import Fp8Config
from model.fp8_weights import first_values, with_exact_weights
from model.glmv import GlmvModel
from model.parallel import ParallelConfig
from model.transformer_engine import TransformerEngineSpecProvider
from model.weights.load import SafetensorsFolder, load_weights
from tests.process_group import alone
from tests.te import tables
from tests.te.definitions import kernels_by_definition
from tests.te.fake_ranks import CASES, RANKS, built, pretended_gpu
from tests.te.fp8_definitions import padding_by_definition, tensorwise_by_definition, weights_in_fp8
from tests.te.test_forward import TOLERANCE, Provider, run
from tests.te.test_specs import ExpertsOneByOne, describe, difference

RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
FULL = ("glm45v", "glm41v_9b")
BUILT = [
    pytest.param(
        preset,
        rank,
        recipe,
        marks=[pytest.mark.slow] if preset in FULL and (preset, recipe) != ("glm41v_9b", "blockwise") else [],
    )
    for preset, rank in CASES
    for recipe in RECIPES
]


@pytest.mark.parametrize(("preset", "rank", "recipe"), BUILT)
def test_parameters_and_checkpoints_are_those_without_fp8(preset: str, rank: str, recipe: str) -> None:
    fp8 = Fp8Config(recipe=recipe, vision=True)
    with built(preset, RANKS[rank], TransformerEngineSpecProvider(), fp8=fp8) as model:
        assert not difference(describe(model), f"{preset}_{rank}")


# --- weights that are kept in FP8 -------------------------------------------------------------------------------------

IN_FP8 = [
    (preset, rank, recipe)
    for preset, rank in (
        ("tiny_moe", "tp2"),
        ("tiny_moe", "tp2_etp2"),
        ("tiny_moe", "ep2"),
        ("tiny_dense", "tp2"),
        ("glm45v", "ep2"),
        ("glm41v_9b", "tp2"),
    )
    for recipe in ("tensorwise", "blockwise")
]
TABLES = [pytest.param(*case, marks=[pytest.mark.slow] if case[0] in FULL else []) for case in IN_FP8]


def weights_table(preset: str, rank: str, fp8: Fp8Config, backend: Backend | None = None) -> list[list[str]]:
    """Return the weights of a rank that are kept in FP8: name, class, shape of the data, shapes of the scales."""
    with weights_in_fp8(), built(preset, RANKS[rank], backend or TransformerEngineSpecProvider(), fp8=fp8) as model:
        rows = [
            [name, type(weight.data).__name__, tables.dimensions(weight.shape), " ".join(_scales(weight))]
            for name, weight in model.named_parameters()
            if is_float8tensor(weight)
        ]
    return [[re.sub(r"\d+(?=\.linear|$)|(?<=layers\.)\d+", "#", row[0]), *row[1:]] for row in rows]


def _scales(weight: Any) -> Iterator[str]:
    names = ("_scale_inv", "_rowwise_scale_inv", "_columnwise_scale_inv")
    return (tables.dimensions(scale.shape) for name in names if (scale := getattr(weight, name, None)) is not None)


def counted(rows: list[list[str]]) -> list[list[str]]:
    """Return the different rows in order, each with its number."""
    return [[*row, str(rows.count(list(row)))] for row in dict.fromkeys(map(tuple, rows))]


def golden(preset: str, rank: str, recipe: str) -> Path:
    return tables.GOLDEN / f"fp8_{preset}_{rank}_{recipe}.csv"


def kept_in_fp8(recipe: str) -> Fp8Config:
    return Fp8Config(recipe=recipe, param_gather=True, vision=True, first_last_layers_bf16=1)


@pytest.mark.parametrize(("preset", "rank", "recipe"), TABLES)
def test_weights_in_fp8_equal_the_golden_table(preset: str, rank: str, recipe: str) -> None:
    with golden(preset, rank, recipe).open(newline="") as file:
        expected = list(csv.reader(file))[1:]
    assert counted(weights_table(preset, rank, kept_in_fp8(recipe))) == expected


def test_wrong_spec_or_setting_differs_from_the_golden_table() -> None:
    right = weights_table("tiny_moe", "tp2", kept_in_fp8("blockwise"))
    for wrong in (
        weights_table("tiny_moe", "tp2", kept_in_fp8("blockwise"), ExpertsOneByOne()),
        weights_table("tiny_moe", "tp2", kept_in_fp8("tensorwise")),
        weights_table("tiny_moe", "tp2", Fp8Config(recipe="blockwise", param_gather=True)),
    ):
        assert wrong != right


# --- one process, with values -----------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    with alone():
        yield


def build(folder: Path, fp8: Fp8Config, backend: Backend, dtype: torch.dtype = torch.float32) -> GlmvModel:
    with pretended_gpu():
        model = GlmvModel(GlmvConfig.from_hf(folder), ParallelConfig(), backend=backend, fp8=fp8, dtype=dtype)
    load_weights([model], SafetensorsFolder(folder))
    return model


def test_loaded_weights_are_rounded_and_their_exact_values_kept(
    one_process: None, hf_folder: tuple[Path, nn.Module]
) -> None:
    """The optimizer's first main weights are the loaded ones, not those that modules were built with."""
    folder, _ = hf_folder
    expected = dict(build(folder, Fp8Config(), TorchSpecProvider(), torch.bfloat16).named_parameters())
    fp8 = Fp8Config(recipe="tensorwise", param_gather=True)
    with tensorwise_by_definition():
        model = build(folder, fp8, TransformerEngineSpecProvider(), torch.bfloat16)
        exact = dict(first_values(model))
        rounded = {name: p.dequantize() for name, p in model.named_parameters() if is_float8tensor(p)}
    assert exact.keys() == rounded.keys()
    assert exact
    for name, value in exact.items():
        if name in expected:  # experts have other names
            assert torch.equal(value, expected[name])
        error = (rounded[name] - value).abs().max() / value.abs().max()
        assert 0 < error <= 2**-4  # e4m3 has 3 bits behind the point


class Optimizer:
    """One rank of two of a distributed optimizer, as far as main weights are concerned: it holds the second halves."""

    is_stub_optimizer = False
    data_parallel_group = None

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if is_float8tensor(p)]
        self.main = [torch.full([p.numel() - p.numel() // 2], 1.0 / 3) for p in self.parameters]

    def _get_fp8_params_and_shard_fp32_from_fp8(self) -> tuple[list[Any], list[Any], list[Any]]:
        return self.parameters, self.main, [p.numel() // 2 for p in self.parameters]


def test_checkpoint_holds_the_main_weights_in_bf16(one_process: None, hf_folder: tuple[Path, nn.Module]) -> None:
    with tensorwise_by_definition():
        fp8 = Fp8Config(recipe="tensorwise", param_gather=True)
        model = build(hf_folder[0], fp8, TransformerEngineSpecProvider(), torch.bfloat16)
        state: dict[str, Any] = {"model0": {k: v for k, v in model.sharded_state_dict().items() if hasattr(v, "dtype")}}
        in_fp8 = {name for name, shard in state["model0"].items() if is_float8tensor(shard.data)}
        saved = with_exact_weights(state, Optimizer(model), is_loading=False)["model0"]
        empty = with_exact_weights(state, None, is_loading=True)["model0"]
    assert in_fp8
    for name in in_fp8:
        first, second = saved[name].data.view(-1).tensor_split([saved[name].data.numel() // 2])
        assert not first.any()
        assert torch.equal(second, torch.full_like(second, 1.0 / 3))
        assert saved[name].data.dtype == empty[name].data.dtype == torch.bfloat16
    assert all(saved[name] is shard for name, shard in state["model0"].items() if name not in in_fp8)


PRODUCTS = r"(self_attention\.linear_(qkv|proj)|mlp\.(experts\.|shared_experts\.)?linear_fc[12])$"
DECODER, INNER = r"^language_model\.decoder\.layers\.\d\.", r"^language_model\.decoder\.layers\.[12]\."
VISION = r"|^vision_model\.blocks\.layers|^adapter\.mlp"
CONTEXTS = [
    # settings, pattern of the modules whose products are in FP8
    ({"recipe": "delayed"}, DECODER),
    ({"recipe": "tensorwise", "first_last_layers_bf16": 1}, INNER),
    ({"recipe": "blockwise", "vision": True}, DECODER + VISION),
    ({"recipe": "mxfp8", "vision": True, "first_last_layers_bf16": 1}, INNER + VISION),
]


@pytest.mark.parametrize(("settings", "where"), CONTEXTS, ids=lambda value: str(value)[:40])
def test_products_in_fp8_and_no_others(
    one_process: None, hf_folder: tuple[Path, nn.Module], settings: dict[str, Any], where: str
) -> None:
    """Without rounding the result is that of the torch backend: padding of experts and images changes nothing."""
    fp8, computed = Fp8Config(**settings), dict[str, str]()
    with kernels_by_definition():  # the router of the torch backend, too, uses Transformer Engine's product
        expected, expected_gradients = run(build(hf_folder[0], Fp8Config(), TorchSpecProvider()))
    model = build(hf_folder[0], fp8, Provider())

    def note(name: str) -> Any:
        def hook(*_: Any) -> None:
            if FP8GlobalStateManager.is_fp8_enabled():
                computed[name] = type(FP8GlobalStateManager.get_fp8_recipe()).__name__

        return hook

    modules = {name: m for name, m in model.named_modules() if hasattr(m, "fp8_meta") and hasattr(m, "parallel_mode")}
    for name, module in modules.items():
        module.register_forward_pre_hook(note(name))
    with kernels_by_definition(), padding_by_definition():
        logits, gradients = run(model)
    wanted = {name for name in modules if re.search(where, name) and re.search(PRODUCTS, name)}
    assert computed.keys() == wanted
    assert len(wanted) > 3
    assert len(set(computed.values())) == 1
    assert (logits - expected).abs().max() <= TOLERANCE
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
