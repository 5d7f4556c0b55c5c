"""LoRA computes what PEFT computes on transformers' model, in every layout."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from tests.model import lora_cases
from tests.model.layout_cases import samples_of_step
from tests.model.test_layouts import tensor_errors
from tests.peft_reference import adapters_of, in_float64, peft_model, save_adapters
from tests.processes import Processes
from tests.reference import TestSample, transformers_loss

EXACT = 1e-5
WHOLE = {"glm4v_moe": "all", "glm4v": "all dense"}


class Expected(NamedTuple):
    """What PEFT gives for a model: files of its adapters and of their gradients, and the loss of the first step."""

    adapters: str
    gradients: str
    loss: float


@pytest.fixture(scope="module")
def expect(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that computes what PEFT gives."""

    @cache
    def compute(variant: str, targets: str) -> Expected:
        folder = tmp_path_factory.mktemp("peft")
        model = peft_model(variant, targets)
        torch.save(save_adapters(model, folder), folder / "adapters.pt")
        in_float64(model)  # in float32 its own gradients are off by up to 9e-6
        samples = [in_float64_too(sample) for packed in samples_of_step(variant, 1) for sample in packed]
        loss = transformers_loss(model.base_model.model, samples)
        loss.backward()
        torch.save({name: factor.grad for name, factor in adapters_of(model)}, folder / "gradients.pt")
        return Expected(str(folder / "adapters.pt"), str(folder / "gradients.pt"), loss.item())

    return compute


def in_float64_too(sample: TestSample) -> TestSample:
    return replace(sample, pixel_values=sample.pixel_values.double())


def variant_of(hf_folder: tuple[Path, nn.Module]) -> str:
    return str(hf_folder[1].config.model_type)  # type: ignore[union-attr]


def agrees_with_peft(processes: Processes, hf_folder, expect, targets: str, layout: str, **options: Any) -> None:
    variant = variant_of(hf_folder)
    expected = expect(variant, targets)
    answers = processes.run(
        lora_cases.gradients,
        variant=variant,
        folder=str(hf_folder[0]),
        layout=layout,
        targets=targets,
        adapters=expected.adapters,
        expected=expected.gradients,
        **options,
    )
    assert all(answer["loss"] == pytest.approx(expected.loss, rel=EXACT) for answer in answers)
    errors = tensor_errors(answer["differences"] for answer in answers)
    assert max(errors.values()) <= EXACT, max(errors, key=errors.__getitem__)


@pytest.mark.parametrize("hf_folder", ["glm4v_moe", "glm4v"], indirect=True)
@pytest.mark.parametrize("recompute", ["none", "full", pytest.param("selective", marks=pytest.mark.slow)])
def test_one_process_equals_peft(one_process: Processes, hf_folder, expect, recompute: str) -> None:
    agrees_with_peft(one_process, hf_folder, expect, WHOLE[variant_of(hf_folder)], "", recompute=recompute)


@pytest.mark.parametrize(
    ("hf_folder", "layout"),
    [
        ("glm4v_moe", "TP2 SP"),
        ("glm4v_moe", "EP2"),
        ("glm4v_moe", "PP2 VPP2"),
        ("glm4v_moe", "CP2"),
        pytest.param("glm4v_moe", "TP2 SP EP2 vision=tensor", marks=pytest.mark.slow),
        ("glm4v", "TP2"),
        ("glm4v", "TP2 SP vision=tensor"),
        ("glm4v", "PP2 stages=E|ttttL"),
        pytest.param("glm4v", "PP2", marks=pytest.mark.slow),
        pytest.param("glm4v", "DP2", marks=pytest.mark.slow),
    ],
    indirect=["hf_folder"],
)
def test_two_ranks_equal_peft(two_processes: Processes, hf_folder, expect, layout: str) -> None:
    agrees_with_peft(two_processes, hf_folder, expect, WHOLE[variant_of(hf_folder)], layout)


@pytest.mark.parametrize(("hf_folder", "targets"), [("glm4v_moe", "some")], indirect=["hf_folder"])
def test_some_targets_equal_peft(two_processes: Processes, hf_folder, expect, targets: str) -> None:
    """Query and value have no adapters, gate has none beside up, and of an expert's matrices only one has."""
    agrees_with_peft(two_processes, hf_folder, expect, targets, "TP2 SP vision=tensor")


@pytest.mark.parametrize("hf_folder", ["glm4v_moe"], indirect=True)
def test_gradient_norm_and_steps_equal_one_process(
    one_process: Processes, two_processes: Processes, hf_folder, expect
) -> None:
    """The norm is PEFT's, so that clipping is; three steps of the optimizer give the same losses."""
    variant = variant_of(hf_folder)
    expected = expect(variant, "all")
    case = {"variant": variant, "folder": str(hf_folder[0]), "targets": "all", "adapters": expected.adapters}
    alone = one_process.run(lora_cases.train, layout="", **case)[0]
    norm = sum(g.square().sum() for g in torch.load(expected.gradients, weights_only=True).values()) ** 0.5
    assert alone[0]["grad_norm"] == pytest.approx(norm.item(), rel=EXACT)
    for layout in ("TP2 SP", "EP2"):
        for reports in two_processes.run(lora_cases.train, layout=layout, **case):
            for key in ("loss", "grad_norm"):
                assert [r[key] for r in reports] == pytest.approx([r[key] for r in alone], rel=EXACT), layout
