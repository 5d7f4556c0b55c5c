"""Emulated FP8: which layers are rounded, their gradients, the scales of recipe delayed, and layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.encoding.batch import Batch
from model import fp8_rounding
from model.fp8 import AMAX_HISTORY, RECIPES, Fp8Config
from model.fp8_delayed import DelayedScales
from model.fp8_emulation import RoundedProduct, Rounding
from model.fp8_rounding import E4M3, E5M2
from model.fp8_scales import delayed_scales
from model.glmv import GlmvModel
from model.lora import add_adapters
from model.lora_config import LoraConfig
from tests.model import layout_cases
from tests.model.layout_cases import packs_of_step
from tests.model.test_layouts import variant_of
from tests.processes import Processes
from tests.reference import forward_inputs

ALL = [recipe for recipe in RECIPES if recipe != "none"]

# --- which layers -----------------------------------------------------------------------------------------------------

ATTENTION = ("self_attention.linear_qkv", "self_attention.linear_proj")
MLP = ("linear_fc1", "linear_fc2")
DENSE = [*ATTENTION, *(f"mlp.{fc}" for fc in MLP)]
MOE = [
    *ATTENTION,
    *(f"mlp.shared_experts.{fc}" for fc in MLP),
    *(f"mlp.experts.local_experts.{expert}.{fc}" for expert in range(8) for fc in MLP),
]
TOWER = [f"vision_model.blocks.layers.{n}.{name}" for n in range(2) for name in DENSE] + [
    f"adapter.mlp.{fc}" for fc in MLP
]


def decoder(variant: str, layers: range) -> list[str]:
    """Return the linear layers of some decoder layers; the first one of the mixture of experts is dense."""
    names = {n: DENSE if variant == "glm4v" or n == 0 else MOE for n in layers}
    return [f"language_model.decoder.layers.{n}.{name}" for n in layers for name in names[n]]


def rounded_layers(model: GlmvModel, batches: Sequence[Batch]) -> tuple[set[str], set[str]]:
    """Return the matrices whose product differs from that of their input, and all that were multiplied."""
    differ, seen = set(), set()

    def compare(name: str, module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        weight = module.weight.flatten(1)
        x = inputs[0].flatten(1) if isinstance(module, nn.Conv3d | nn.Conv2d) else inputs[0]
        if not x.numel() or x.size(-1) != weight.size(1):
            return  # an expert without tokens; a convolution that the model computes in another way
        bias = None if getattr(module, "skip_bias_add", False) else getattr(module, "bias", None)
        expected = F.linear(x, weight, bias)
        if name.endswith("router"):
            output = module.gating(x)  # its scores
        got = (output[0] if isinstance(output, tuple) else output).reshape(expected.shape)
        seen.add(name)
        if (got - expected).norm() > 1e-4 * expected.norm():
            differ.add(name)

    hooks = [
        module.register_forward_hook(lambda m, i, o, name=name: compare(name, m, i, o))
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None
        and module.weight.dim() > 1
        and not isinstance(module, nn.Embedding)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**forward_inputs(batch))
    for hook in hooks:
        hook.remove()
    return differ, seen


CHOICES: list[tuple[Fp8Config, range, bool]] = [
    (Fp8Config(), range(0), False),
    *((Fp8Config(recipe=recipe), range(4), False) for recipe in ALL),
    (Fp8Config(recipe="blockwise", first_last_layers_bf16=1), range(1, 3), False),
    (Fp8Config(recipe="mxfp8", vision=True), range(4), True),
]


@pytest.mark.fast
def test_every_expected_linear_layer_is_rounded_and_no_other(build: Callable[..., GlmvModel], hf_folder) -> None:
    variant = variant_of(hf_folder)
    batches = packs_of_step(variant, 1)
    for fp8, layers, with_tower in CHOICES:
        model = build(fp8=fp8)
        for router in model.routers():
            router.expert_bias.zero_()  # so that every expert gets tokens
        expected = {*decoder(variant, layers), *(TOWER if with_tower else ())}
        differ, seen = rounded_layers(model, batches)
        assert differ == expected, fp8
        assert {"language_model.output_layer", "adapter.proj"} <= seen - differ


def test_adapters_of_lora_are_not_rounded(build: Callable[..., GlmvModel], hf_folder) -> None:
    """With factors of zero the adapters add nothing, so the model is the one without."""
    batch = packs_of_step(variant_of(hf_folder), 1)[0]
    model = build(fp8=Fp8Config(recipe="mxfp8"))
    with torch.no_grad():
        before = model(**forward_inputs(batch))
        add_adapters(model, LoraConfig(rank=4, targets=["all-linear"]))
        assert torch.equal(model(**forward_inputs(batch)), before)


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_gradients_are_products_of_rounded_operands(recipe: str) -> None:
    """Against torch's gradients of a product of operands that are rounded before, each along its summed dimension."""
    fp8 = Fp8Config(recipe=recipe)
    generator = torch.Generator().manual_seed(1)
    x, w, b, g = (torch.randn(*size, generator=generator) for size in ((2, 80, 96), (160, 96), (160,), (2, 80, 160)))
    leaves: list[Any] = [value.clone().requires_grad_() for value in (x, w, b)]
    y = RoundedProduct.apply(*leaves, Rounding(fp8, None))
    y.backward(g)

    def rounded(role: str, value: Tensor, summed: int) -> Tensor:
        return fp8_rounding.round_operand(fp8, role, value.flatten(0, -2), summed).requires_grad_()

    torch.testing.assert_close(y.flatten(0, 1), F.linear(rounded("input", x, 1), rounded("weight", w, 1), b))
    own_x, own_w = rounded("input", x, 0), rounded("weight", w, 0)
    F.linear(own_x, own_w).backward(rounded("gradient", g, 1))
    torch.testing.assert_close(leaves[0].grad.flatten(0, 1), own_x.grad)
    own_w.grad = None
    F.linear(own_x, own_w).backward(rounded("gradient", g, 0))
    torch.testing.assert_close(leaves[1].grad, own_w.grad)
    torch.testing.assert_close(leaves[2].grad, g.flatten(0, 1).sum(0))


@pytest.mark.fast
def test_frozen_weights_and_inputs_without_gradient() -> None:
    x, w, rounding = torch.randn(8, 32), torch.randn(16, 32), Rounding(Fp8Config(recipe="mxfp8"), None)
    frozen = x.clone().requires_grad_()
    RoundedProduct.apply(frozen, w, None, rounding).sum().backward()
    assert frozen.grad is not None
    first = w.clone().requires_grad_()
    RoundedProduct.apply(x, first, None, rounding).sum().backward()
    assert first.grad is not None


# --- delayed ----------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_scales_follow_the_largest_of_the_window_and_continue_from_their_state() -> None:
    """Against the maximum of a list of all amaxes. Zero, NaN and infinity change nothing."""
    scales = DelayedScales([E4M3, E4M3, E5M2], "cpu")
    generator = torch.Generator().manual_seed(4)
    history: list[list[float]] = []
    for step in range(2 * AMAX_HISTORY + 50):
        amaxes = (torch.rand(3, generator=generator) * 2.0 ** (-step % 700 / 100)).tolist()
        if step % 10 == 3:
            amaxes[step % 3] = [0.0, float("inf"), float("nan")][step // 10 % 3]
        scales.update(amaxes)
        history.append([amax if 0 < amax < float("inf") else 0.0 for amax in amaxes])
        if step % 97 == 0:
            state = scales.state_dict()
            scales = DelayedScales([E4M3, E4M3, E5M2], "cpu")
            scales.load_state_dict(state)
        largest = [max(column) for column in zip(*history[-AMAX_HISTORY:], strict=True)]
        found = [scales.scale(role).item() for role in ("input", "weight", "gradient")]
        expected = [
            form.largest / amax if amax else 1.0 for form, amax in zip((E4M3, E4M3, E5M2), largest, strict=True)
        ]
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_forward_pass_without_gradients_leaves_no_trace(build: Callable[..., GlmvModel], hf_folder) -> None:
    model = build(fp8=Fp8Config(recipe="delayed")).train()
    with torch.no_grad():
        model(**forward_inputs(packs_of_step(variant_of(hf_folder), 1)[0]))
    assert all(not scales.amax.any() for _, scales in delayed_scales([model]))


# --- layouts ----------------------------------------------------------------------------------------------------------


# Sums in another order differ in the last bits of float32, and a value between two numbers of FP8 may then become
# the other one, a step away. So much did losses and norms of two steps change in one process when all weights were
# changed by one bit or none: the most of six draws for each case below. Pipeline stages change no sum.
FLIPS = {"loss": 7.6e-4, "vision": 1.2e-2, "adapter": 1.3e-2, "decoder": 1.5e-2, "router": 3.0e-2}

LAYOUTS = [
    ("glm4v", "delayed", "TP2"),
    pytest.param("glm4v_moe", "mxfp8", "TP2 SP", marks=pytest.mark.slow),
    pytest.param("glm4v_moe", "delayed", "TP2 SP", marks=pytest.mark.slow),
    pytest.param("glm4v_moe", "blockwise", "PP2 VPP2", marks=pytest.mark.slow),
    pytest.param("glm4v", "mxfp8", "TP2", marks=pytest.mark.slow),
]


def losses_and_norms(report: dict[str, Any]) -> dict[str, float]:
    return {"loss": report["loss"], **report["part_norms"]}


@pytest.mark.parametrize(("hf_folder", "recipe", "layout"), LAYOUTS, indirect=["hf_folder"])
def test_two_ranks_train_like_one_process(
    one_process: Processes, two_processes: Processes, hf_folder: tuple[Path, nn.Module], recipe: str, layout: str
) -> None:
    """In layouts that scale the same values together: sequence parallelism gathers, 32 values are on one rank.

    Not with more data-parallel ranks and `delayed`: gradients are larger by their number before they are averaged, and
    the scales of the first step are 1.
    """
    case: dict[str, Any] = {"variant": variant_of(hf_folder), "folder": str(hf_folder[0]), "steps": (1, 2)}
    [expected] = one_process.run(layout_cases.train, layout="", fp8=recipe, **case)
    [unrounded] = one_process.run(layout_cases.train, layout="", **case)
    want, other = ([losses_and_norms(report) for report in run["reports"]] for run in (expected, unrounded))
    for answer in two_processes.run(layout_cases.train, layout=layout, fp8=recipe, **case):
        got = [losses_and_norms(report) for report in answer["reports"]]
        for step, values in enumerate(want):
            for name, value in values.items():
                allowed = 1e-12 if layout.startswith("PP") else FLIPS[name]
                assert got[step][name] == pytest.approx(value, rel=allowed), (step, name)
        for name in ("loss", "decoder"):  # which flips reach least
            assert abs(got[0][name] - want[0][name]) < abs(other[0][name] - want[0][name]) / 4, name
        assert answer["scales"].keys() == expected["scales"].keys()
