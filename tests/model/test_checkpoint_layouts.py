"""A checkpoint of any layout resumes in any other as if the layout had not changed, optimizer state included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.model import checkpoint_cases, layout_cases
from tests.model.test_layouts import EXACT, reports_agree, variant_of, whole_model_difference
from tests.processes import Processes

EMPTY_STAGE = "PP2 VPP2 stages=Et|tt||tL"  # the second virtual stage of the first rank is empty

# Processes and layout that save after three steps; processes and layout that train three more.
MOE = [
    ((2, "TP2 SP"), (2, "EP2")),
    ((2, "EP2"), (2, "PP2 stages=Et|tttL")),  # one stage has no experts
    ((2, "PP2 stages=Et|tttL"), (1, "")),
    ((2, "PP2 VPP2"), (2, "CP2")),
    ((4, "EP2 ETP2"), (2, "PP2 VPP2")),
    ((2, "CP2"), (4, "EP2 CP2")),
    ((1, ""), (4, "TP2 SP PP2")),
    ((1, ""), (2, EMPTY_STAGE)),
    ((2, EMPTY_STAGE), (1, "")),
    ((4, "TP2 SP CP2 vision=tensor"), (2, "TP2 SP")),
]
DENSE = [
    ((2, "TP2"), (2, "PP2 VPP2")),
    ((2, "PP2 VPP2"), (4, "TP2 CP2")),
    ((4, "TP2 CP2"), (2, "DP2")),
    ((2, "DP2"), (4, "PP4")),
    ((4, "PP4"), (2, "TP2 vision=tensor")),
    ((1, ""), (2, EMPTY_STAGE)),
]


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[int, Processes]]:
    with Processes(1) as one, Processes(2) as two, Processes(4) as four:
        yield {1: one, 2: two, 4: four}


@pytest.fixture(scope="module")
def six_steps(
    processes: dict[int, Processes], hf_folder: tuple[Path, nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], str]:
    """The reports of six steps of one process, and the file of its parameters after them."""
    saved = str(tmp_path_factory.mktemp("six_steps") / "parameters.pt")
    answer = processes[1].run(
        layout_cases.train,
        variant=variant_of(hf_folder),
        folder=str(hf_folder[0]),
        layout="",
        steps=range(1, 7),
        save_to=saved,
    )[0]
    return answer["reports"], f"{saved}.0"


@pytest.fixture(scope="module")
def saved(processes: dict[int, Processes], hf_folder: tuple[Path, nn.Module], tmp_path_factory: pytest.TempPathFactory):
    """Checkpoints after three steps, made once for each layout."""
    made: dict[tuple[int, str], Path] = {}

    def checkpoint(size: int, layout: str) -> Path:
        if (size, layout) not in made:
            path = made[size, layout] = tmp_path_factory.mktemp("checkpoint") / "step_0000003"
            processes[size].run(
                layout_cases.train,
                variant=variant_of(hf_folder),
                folder=str(hf_folder[0]),
                layout=layout,
                checkpoint=str(path),
            )
        return made[size, layout]

    return checkpoint


PAIRS = [
    pytest.param(variant, before, after, id=f"{variant}, {before[1] or 'one process'} to {after[1] or 'one process'}")
    for variant, pairs in (("glm4v_moe", MOE), ("glm4v", DENSE))
    for before, after in pairs
]


@pytest.mark.parametrize(("hf_folder", "before", "after"), PAIRS, indirect=["hf_folder"])
def test_training_resumes_in_another_layout(
    processes: dict[int, Processes], hf_folder, six_steps, saved, before: tuple[int, str], after: tuple[int, str]
) -> None:
    reports, parameters = six_steps
    size, layout = after
    answers = processes[size].run(
        layout_cases.train,
        variant=variant_of(hf_folder),
        folder=str(hf_folder[0]),
        layout=layout,
        steps=range(4, 7),
        load_from=str(saved(*before)),
        compare_with=parameters,
    )
    for answer in answers:
        reports_agree(answer["reports"], reports[3:])
    assert whole_model_difference(answers) <= EXACT


def test_a_checkpoint_from_before_the_first_update_resumes(
    processes: dict[int, Processes], hf_folder, six_steps, tmp_path: Path
) -> None:
    """Saving it changes nothing either."""
    reports, parameters = six_steps
    case: dict[str, Any] = {"variant": variant_of(hf_folder), "folder": str(hf_folder[0])}
    saved = str(tmp_path / "step_0000000")
    found = processes[2].run(layout_cases.save_before_updates, layout="DP2", checkpoint=saved, **case)
    reports_agree(found, reports[:1] * 2)
    resume: dict[str, Any] = {"steps": range(1, 7), "load_from": saved, "compare_with": parameters}
    answers = processes[1].run(layout_cases.train, layout="", **resume, **case)
    reports_agree(answers[0]["reports"], reports)
    assert whole_model_difference(answers) <= EXACT


# --- problems that one process finds ----------------------------------------------------------------------------------


def test_damage_is_reported_by_every_process(processes: dict[int, Processes], tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_0000001"
    arguments: dict[str, Any] = {"variant": "glm4v", "checkpoint": str(checkpoint)}
    processes[2].run(checkpoint_cases.save, layout="TP2", **arguments)
    assert processes[4].run(checkpoint_cases.load_error, layout="TP2", **arguments) == [""] * 4
    file = next((checkpoint / "state").glob("__1_*.distcp"))
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    errors = processes[4].run(checkpoint_cases.load_error, layout="TP2", **arguments)
    assert [f"{file} is damaged: its content is not what was saved" in error for error in errors] == [True] * 4


def test_weights_that_are_not_finite_are_reported_by_every_process(
    processes: dict[int, Processes], tmp_path: Path
) -> None:
    """Only the first stage has them."""
    arguments: dict[str, Any] = {"variant": "glm4v", "checkpoint": str(tmp_path / "step_0000001")}
    processes[1].run(checkpoint_cases.fill_adapter_with_nan_and_save, layout="", **arguments)
    errors = processes[2].run(checkpoint_cases.load_error, layout="PP2", **arguments)
    assert ["not finite (NaN or infinity) in adapter.proj.weight" in error for error in errors] == [True] * 2


def test_failed_save_ends_on_every_process(processes: dict[int, Processes], tmp_path: Path) -> None:
    errors = processes[2].run(
        checkpoint_cases.save_error,
        variant="glm4v",
        layout="TP2",
        checkpoint=str(tmp_path / "step_0000001"),
        max_file_bytes=500_000,
    )
    assert [error.startswith("cannot write the checkpoint") for error in errors] == [True] * 2
    assert "File too large" in errors[0]
    assert list(tmp_path.iterdir()) == []
