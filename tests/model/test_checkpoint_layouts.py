"""A checkpoint of any layout resumes in any other as if the layout had not changed, optimizer state included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.model import layout_cases
from tests.model.test_layouts import EXACT, reports_agree, variant_of, whole_model_difference
from tests.processes import Processes

# processes and layout that save after three steps; processes and layout that train three more
MOE = [
    ((2, "TP2 SP"), (2, "EP2")),
    ((2, "EP2"), (2, "PP2 stages=Et|tttL")),  # one stage has no experts
    ((2, "PP2 stages=Et|tttL"), (1, "")),
    ((2, "PP2 VPP2"), (2, "CP2")),
    ((4, "EP2 ETP2"), (2, "PP2 VPP2")),
    ((2, "CP2"), (4, "EP2 CP2")),
    ((1, ""), (4, "TP2 SP PP2")),
    ((4, "TP2 SP CP2 vision=tensor"), (2, "TP2 SP")),
]
DENSE = [
    ((2, "TP2"), (2, "PP2 VPP2")),
    ((2, "PP2 VPP2"), (4, "TP2 CP2")),
    ((4, "TP2 CP2"), (2, "DP2")),
    ((2, "DP2"), (4, "PP4")),
    ((4, "PP4"), (2, "TP2 vision=tensor")),
]


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[int, Processes]]:
    with Processes(1) as one, Processes(2) as two, Processes(4) as four:
        yield {1: one, 2: two, 4: four}


@pytest.fixture(scope="module")
def six_steps(
    processes: dict[int, Processes], hf_folder: tuple[Path, nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], str]:
    """What one process reports of six steps, and the file of its parameters after them."""
    saved = str(tmp_path_factory.mktemp("six_steps") / "parameters.pt")
    answer = processes[1].run(
        layout_cases.train, variant=variant_of(hf_folder), folder=str(hf_folder[0]), layout="", steps=range(1, 7),
        save_to=saved,
    )[0]  # fmt: skip
    return answer["reports"], f"{saved}.0"


@pytest.fixture(scope="module")
def saved(processes: dict[int, Processes], hf_folder: tuple[Path, nn.Module], tmp_path_factory: pytest.TempPathFactory):
    """Checkpoints after three steps, each layout's made once."""
    made: dict[tuple[int, str], Path] = {}

    def checkpoint(size: int, layout: str) -> Path:
        if (size, layout) not in made:
            path = made[size, layout] = tmp_path_factory.mktemp("checkpoint") / "step_0000003"
            processes[size].run(
                layout_cases.train, variant=variant_of(hf_folder), folder=str(hf_folder[0]), layout=layout,
                checkpoint=str(path),
            )  # fmt: skip
        return made[size, layout]

    return checkpoint


PAIRS = [("glm4v_moe", *pair) for pair in MOE] + [("glm4v", *pair) for pair in DENSE]


@pytest.mark.parametrize(("hf_folder", "before", "after"), PAIRS, indirect=["hf_folder"])
def test_training_resumes_in_another_layout(
    processes: dict[int, Processes], hf_folder, six_steps, saved, before: tuple[int, str], after: tuple[int, str]
) -> None:
    reports, parameters = six_steps
    size, layout = after
    answers = processes[size].run(
        layout_cases.train, variant=variant_of(hf_folder), folder=str(hf_folder[0]), layout=layout,
        steps=range(4, 7), load_from=str(saved(*before)), compare_with=parameters,
    )  # fmt: skip
    for answer in answers:
        reports_agree(answer["reports"], reports[3:])
    assert whole_model_difference(answers) <= EXACT
