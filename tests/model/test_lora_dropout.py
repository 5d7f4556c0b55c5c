"""Dropout before adapters: the masks of the formula, PEFT's result with the same masks in every layout, statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from model.lora_dropout import AdapterDropout, PackNumber
from tests.dropout_reference import expected_mask, force_dropout, placed
from tests.model import lora_cases
from tests.model.layout_cases import samples_of_step
from tests.model.test_layouts import tensor_errors
from tests.model.test_lora import EXACT, Expected, variant_of
from tests.peft_reference import adapters_of, peft_model, save_adapters
from tests.processes import Processes
from tests.reference import transformers_loss

DROPOUT = 0.3
TARGETS = {"glm4v_moe": "modules", "glm4v": "all dense"}
MODULE = "model.language_model.layers.0.self_attn.q_proj"


# --- masks ------------------------------------------------------------------------------------------------------------


def mask(rows: range, channels: range, probability: float = DROPOUT, key: str = f"11/1/0/{MODULE}") -> np.ndarray:
    """Return the mask of a module that sees some rows and channels."""
    seed, step, pack, module = key.split("/")
    dropout = AdapterDropout(probability, int(seed))
    dropout.begin(PackNumber(int(step), int(pack)))
    dropout.work_on(torch.tensor(rows))
    found = dropout.mask(module, channels)
    assert found is not None
    return found.keeps().numpy()


@pytest.mark.fast
@pytest.mark.parametrize("probability", [0.0001, 0.05, 0.5, 0.97])
def test_mask_is_that_of_the_formula(probability: float) -> None:
    for rows, channels in ((range(77), range(131)), (range(30, 51), range(17, 42)), (range(9), range(8, 9))):
        expected = expected_mask(f"11/1/0/{MODULE}", rows, channels, probability)
        assert (mask(rows, channels, probability) == expected).all()


@pytest.mark.fast
@pytest.mark.parametrize("probability", [0.05, 0.3, 0.5])
def test_values_are_dropped_independently(probability: float) -> None:
    """Means and correlations are within 5 standard deviations of those of independent values."""
    rows, channels = range(2048), range(512)

    def centred(key: str = f"11/1/0/{MODULE}", rows: range = rows) -> np.ndarray:
        return mask(rows, channels, probability, key) - (1 - probability)

    one = centred()
    deviation = (probability * (1 - probability)) ** 0.5
    assert abs(one.mean()) < 5 * deviation / one.size**0.5
    for axis in (0, 1):
        assert np.abs(one.mean(axis)).max() < 6 * deviation / one.shape[axis] ** 0.5
    others = [
        centred("12/1/0/" + MODULE),
        centred("11/2/0/" + MODULE),
        centred("11/1/1/" + MODULE),
        centred("11/1/0/" + MODULE.replace("q_proj", "k_proj")),
        centred("11/1/0/" + MODULE.replace("layers.0", "layers.1")),
        centred(rows=range(2048, 4096)),
        np.roll(one, 1, axis=1),
        np.roll(one, 2, axis=1),
        np.roll(one, 1, axis=0),
        np.roll(one, (1, 1), axis=(0, 1)),
    ]
    for other in others:
        assert abs((one * other).mean()) < 5 * deviation**2 / one.size**0.5


@pytest.mark.fast
def test_nothing_is_dropped_in_evaluation() -> None:
    dropout = AdapterDropout(DROPOUT, 11)
    dropout.begin(PackNumber(1, 0))
    dropout.work_on(torch.arange(4))
    dropout.begin(None)
    dropout.work_on(torch.arange(4))
    assert dropout.mask(MODULE, range(4)) is None


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes() -> Iterator[Callable[[int], Processes]]:
    with Processes(1) as one, Processes(2) as two:
        yield {1: one, 2: two}.__getitem__


@pytest.fixture(scope="module")
def expect(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Expected]:
    """Return a function that computes what PEFT gives with the masks of the formula."""

    @cache
    def compute(variant: str) -> Expected:
        folder = tmp_path_factory.mktemp("peft")
        model = peft_model(variant, TARGETS[variant])
        torch.save(save_adapters(model, folder), folder / "adapters.pt")
        place = force_dropout(model, DROPOUT)
        samples = placed(samples_of_step(variant, 1), lora_cases.SEED, 1, place)
        loss = transformers_loss(model.base_model.model, samples)
        loss.backward()
        torch.save({name: factor.grad for name, factor in adapters_of(model)}, folder / "gradients.pt")
        return Expected(str(folder / "adapters.pt"), str(folder / "gradients.pt"), loss.item())

    return compute


@pytest.mark.parametrize(
    ("hf_folder", "layout", "recompute"),
    [
        ("glm4v_moe", "", "full"),
        ("glm4v_moe", "PP2 VPP2", "full"),
        ("glm4v_moe", "TP2 SP EP2", "none"),
        ("glm4v", "TP2 SP vision=tensor", "selective"),
        ("glm4v", "CP2", "none"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("glm4v", "", "none"),
                ("glm4v", "", "full"),
                ("glm4v_moe", "", "selective"),
                ("glm4v_moe", "TP2 SP EP2 vision=tensor", "full"),
                ("glm4v_moe", "EP2", "full"),
                ("glm4v_moe", "CP2", "full"),
                ("glm4v_moe", "PP2", "full"),
                ("glm4v", "PP2 VPP2", "full"),
                ("glm4v", "TP2", "full"),
                ("glm4v", "PP2 stages=E|ttttL", "selective"),
                ("glm4v", "DP2", "full"),
            )
        ),
    ],
    indirect=["hf_folder"],
)
def test_model_equals_peft_with_the_same_masks(
    processes, hf_folder: tuple[Path, nn.Module], expect, layout: str, recompute: str
) -> None:
    variant = variant_of(hf_folder)
    expected = expect(variant)
    answers = processes(2 if layout else 1).run(
        lora_cases.gradients,
        variant=variant,
        folder=str(hf_folder[0]),
        layout=layout,
        targets=TARGETS[variant],
        adapters=expected.adapters,
        expected=expected.gradients,
        recompute=recompute,
        dropout=DROPOUT,
    )
    assert all(answer["loss"] == pytest.approx(expected.loss, rel=EXACT) for answer in answers)
    errors = tensor_errors(answer["differences"] for answer in answers)
    assert max(errors.values()) <= EXACT, max(errors, key=errors.__getitem__)


@pytest.mark.parametrize("hf_folder", ["glm4v"], indirect=True)
def test_run_resumes_bit_for_bit_and_evaluates_without_dropout(
    processes, hf_folder: tuple[Path, nn.Module], expect, tmp_path: Path
) -> None:
    variant, checkpoint = variant_of(hf_folder), str(tmp_path / "step_0000002")
    case: dict[str, Any] = {"variant": variant, "folder": str(hf_folder[0]), "targets": TARGETS[variant]}
    case |= {"adapters": expect(variant).adapters, "dropout": DROPOUT}
    run = partial(processes(2).run, lora_cases.continue_run, **{"layout": "DP2", **case})
    whole = run(steps=[1, 2, 3], checkpoint=checkpoint, save_at=2)
    resumed = run(steps=[3], load_from=checkpoint)
    plain = run(steps=[3], load_from=checkpoint, dropout=0.0)
    for rank in range(2):
        assert resumed[rank]["reports"] == whole[rank]["reports"][2:]
        assert resumed[rank]["adapters"] == whole[rank]["adapters"]
        assert resumed[rank]["held out"] == plain[rank]["held out"]
        assert resumed[rank]["reports"][0]["loss"] != plain[rank]["reports"][0]["loss"]
    [alone] = processes(1).run(lora_cases.continue_run, layout="", steps=[1, 2, 3], **case)
    for key in ("loss", "grad_norm"):
        expected = [report[key] for report in alone["reports"]]
        assert [report[key] for report in whole[0]["reports"]] == pytest.approx(expected, rel=EXACT)
