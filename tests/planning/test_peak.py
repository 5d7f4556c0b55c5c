"""The peak of memory of a step on paper, against torch's allocator in the same step with values."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from tests.planning import peak_cases
from tests.processes import Processes

TOLERANCE = 0.01

NONE: dict[str, str] = {}
SELECTIVE = {"decoder": "selective", "vision": "selective"}
FULL = {"decoder": "full", "vision": "full"}


@pytest.fixture(scope="module")
def new_process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def check(processes: Processes, on_paper: ProcessPoolExecutor, **case: Any) -> None:
    measured = processes.run(peak_cases.measured, **case)
    for rank, found in enumerate(measured):
        planned = on_paper.submit(peak_cases.on_paper, rank, **case).result(timeout=120)
        assert planned.parameters == found["parameters"]
        assert max(planned.activations, planned.update) == pytest.approx(found["peak"], rel=TOLERANCE)


@pytest.mark.parametrize("recompute", [NONE, FULL], ids=["none", "full"])
@pytest.mark.parametrize("variant", ["glm4v_moe", "glm4v"])
def test_one_process(
    one_process: Processes, new_process: ProcessPoolExecutor, variant: str, recompute: dict[str, str]
) -> None:
    check(one_process, new_process, variant=variant, layout="", recompute=recompute)


@pytest.mark.parametrize(
    ("variant", "layout", "recompute"),
    [
        ("glm4v_moe", "EP2", NONE),
        ("glm4v_moe", "CP2", FULL),
        pytest.param("glm4v_moe", "EP2", FULL, marks=pytest.mark.slow),
        pytest.param("glm4v_moe", "CP2", NONE, marks=pytest.mark.slow),
        pytest.param("glm4v", "CP2", NONE, marks=pytest.mark.slow),
        pytest.param("glm4v", "CP2", FULL, marks=pytest.mark.slow),
        pytest.param("glm4v", "TP2 SP", NONE, marks=pytest.mark.slow),
        pytest.param("glm4v", "TP2 SP", FULL, marks=pytest.mark.slow),
    ],
)
def test_two_processes(
    two_processes: Processes,
    new_process: ProcessPoolExecutor,
    variant: str,
    layout: str,
    recompute: dict[str, str],
) -> None:
    check(two_processes, new_process, variant=variant, layout=layout, recompute=recompute)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["glm4v_moe", "glm4v"])
def test_selective_recompute(one_process: Processes, new_process: ProcessPoolExecutor, variant: str) -> None:
    check(one_process, new_process, variant=variant, layout="", recompute=SELECTIVE)
