"""A step computed twice equals a step computed once; if the two computations differ, the run stops."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import ROOT, metrics
from tests.processes import Processes
from tests.training import determinism_cases
from tests.training.step_cases import case_of


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[int, Processes]]:
    with Processes(1) as one, Processes(2) as two:
        yield {1: one, 2: two}


LAYOUTS = [(1, ""), (2, "EP2"), (2, "PP2 stages=Et|tttL")]  # one stage of the last has no experts


@pytest.mark.parametrize("hf_folder", ["glm4v_moe"], indirect=True)
@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_step_computed_twice_equals_step_computed_once(
    processes: dict[int, Processes], hf_folder, size: int, layout: str
) -> None:
    for answer in processes[size].run(determinism_cases.once_and_twice, layout=layout, **case_of(hf_folder)):
        once, twice = answer["reports"]
        assert twice == once
        assert once[0]["moe"]["balance_loss"] > 0
        assert not answer["differ"]


NOISY = [
    # variant, processes, layout, gradient of the last rank, layer counted from 0 in the whole model
    ("glm4v_moe", 1, "", "adapter.proj.weight"),
    ("glm4v_moe", 2, "EP2", "language_model.decoder.layers.2.mlp.router.weight"),
    ("glm4v", 2, "PP2 VPP2", "language_model.decoder.layers.3.self_attention.linear_proj.weight"),
]


@pytest.mark.parametrize(("hf_folder", "size", "layout", "name"), NOISY, indirect=["hf_folder"])
def test_step_that_differs_the_second_time_stops_all_ranks(
    processes: dict[int, Processes], hf_folder, size: int, layout: str, name: str
) -> None:
    case = case_of(hf_folder)
    answers = processes[size].run(determinism_cases.noisy_the_second_time, layout=layout, name=name, **case)
    assert answers[-1].startswith("step 1: computed again, gradients differ on ")
    assert re.search(rf"here 1 of \d+ do, such as {re.escape(name)};", answers[-1])
    for answer in answers:
        assert answer.startswith("step 1: computed again")
    if layout.startswith("PP2"):
        assert "differ on 1 of 2 processes, none here;" in answers[0]


def test_run_with_a_noisy_step_stops_with_one_line(config_file: Path, tmp_path: Path) -> None:
    """Every step is noisy; the second is the first that is checked."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.training.noisy_train",
            "--config",
            str(config_file),
            "train.check_determinism=2",
            "checkpoint.save_interval=1",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("error on rank 0: step 2: computed again, gradients differ on 1 of 1 processes, here 1 of ")
    assert "such as adapter.proj.weight; set train.deterministic=true" in line
    assert "Traceback" not in done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_0000001\n"
