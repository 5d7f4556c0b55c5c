"""Every layout trains as one process does: losses, gradient norms and updated parameters after three steps.

The packs hold pictures, a clip and text; with two data-parallel ranks, one has no image at all. Balance loss and
expert-bias updates are on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.model import layout_cases
from tests.processes import Processes

EXACT = 1e-5

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "EP2": {"expert_model_parallel_size": 2},
    "TP2 SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "TP2 SP EP2": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
    "TP2": {"tensor_model_parallel_size": 2},
}
TWO_RANKS = [
    ("glm4v_moe", "DP2"), ("glm4v_moe", "EP2"), ("glm4v_moe", "TP2 SP"), ("glm4v_moe", "TP2 SP EP2"),
    ("glm4v", "DP2"), ("glm4v", "TP2 SP"), ("glm4v", "TP2"),
]  # fmt: skip
FOUR_RANKS = [("glm4v_moe", "EP2"), ("glm4v_moe", "TP2 SP EP2"), ("glm4v", "TP2 SP")]  # each with DP2 besides
SAME_COUNTS = ("tokens", "samples", "images", "patches", "padding_fraction")


@pytest.fixture(scope="module")
def two_processes() -> Iterator[Processes]:
    with Processes(2) as processes:
        yield processes


@pytest.fixture(scope="module")
def four_processes() -> Iterator[Processes]:
    with Processes(4) as processes:
        yield processes


@pytest.fixture(scope="module")
def one_process() -> Iterator[Processes]:
    with Processes(1) as processes:
        yield processes


@pytest.fixture(scope="module")
def expected(
    one_process: Processes, hf_folder: tuple[Path, nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[dict[str, Any]], str]:
    """The variant, what one process reports of its steps, and its parameters after them."""
    folder, reference = hf_folder
    variant = str(reference.config.model_type)  # type: ignore[union-attr]
    saved = str(tmp_path_factory.mktemp("reference") / "parameters.pt")
    answer = one_process.run(
        layout_cases.train, variant=variant, folder=str(folder), layout={}, steps=3, save_to=saved
    )[0]
    return variant, answer["reports"], saved


@pytest.mark.parametrize(("hf_folder", "name"), TWO_RANKS, indirect=["hf_folder"])
def test_two_ranks_train_as_one_process(two_processes: Processes, hf_folder, expected, name: str) -> None:
    trains_as_one_process(two_processes, hf_folder[0], expected, name)


@pytest.mark.parametrize(("hf_folder", "name"), FOUR_RANKS, indirect=["hf_folder"])
def test_four_ranks_train_as_one_process(four_processes: Processes, hf_folder, expected, name: str) -> None:
    trains_as_one_process(four_processes, hf_folder[0], expected, name)


def trains_as_one_process(processes: Processes, folder: Path, expected, name: str) -> None:
    variant, reference, saved = expected
    answers = processes.run(
        layout_cases.train, variant=variant, folder=str(folder), layout=LAYOUTS[name], steps=3, compare_with=saved
    )
    for answer in answers:
        for step, (got, want) in enumerate(zip(answer["reports"], reference, strict=True), start=1):
            assert got["loss"] == pytest.approx(want["loss"], rel=EXACT), f"loss of step {step}"
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=EXACT), f"gradient norm of step {step}"
            assert got["domain_losses"] == pytest.approx(want["domain_losses"], rel=EXACT)
            assert got["moe"] == pytest.approx(want["moe"], rel=EXACT)
            assert {key: got[key] for key in SAME_COUNTS} == {key: want[key] for key in SAME_COUNTS}
    assert whole_model_difference(answers) <= EXACT
    for answer in answers:
        for tensor, (difference, size) in answer["differences"].items():
            if tensor.endswith("expert_bias"):
                assert difference == 0, tensor
            elif not tensor.endswith("linear_qkv.bias"):  # holds the keys' biases, some of whose gradients are zero
                assert (difference / max(size, 1e-12)) ** 0.5 <= 1e-4, tensor


def whole_model_difference(answers: list[dict[str, Any]]) -> float:
    squares = [pair for answer in answers for pair in answer["differences"].values()]
    return (sum(d for d, _ in squares) / sum(s for _, s in squares)) ** 0.5
