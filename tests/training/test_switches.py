"""Switches that change when something is computed or sent, and not what."""

from __future__ import annotations

import gc
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_pipeline.loading.workers import init_worker
from tests.launch import metrics, train
from tests.processes import Processes
from tests.training import step_cases, switch_cases
from tests.training.step_cases import case_of, train_alike
from training.batch_broadcast import copied_ahead
from training.garbage import garbage_collected_every

MOE = pytest.mark.parametrize("hf_folder", ["glm4v_moe"], indirect=True)
OVERLAP = {"shared_expert_overlap": True}


@pytest.fixture(scope="module")
def one_process(hf_folder: tuple[Path, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """What one process reports of three steps, and the file of its parameters."""
    kept = str(tmp_path_factory.mktemp("one") / "parameters.pt")
    with Processes(1) as process:
        return process.run(step_cases.train, keep_in=kept, **case_of(hf_folder))[0], kept


# --- experts ----------------------------------------------------------------------------------------------------------


@MOE
@pytest.mark.parametrize(("layout", "recompute"), [("EP2", "none"), ("TP2 SP EP2", "full")])
def test_overlapped_shared_expert_trains_like_one_process(
    two_processes: Processes, one_process, hf_folder, layout: str, recompute: str
) -> None:
    one, kept = one_process
    options: dict[str, Any] = {"recompute": {"decoder": recompute}, "dispatch": OVERLAP, "compare_with": kept}
    train_alike(two_processes.run(step_cases.train, layout=layout, **options, **case_of(hf_folder)), one)


@MOE
@pytest.mark.parametrize("layout", ["EP2", "TP2 SP EP2"])
def test_dispatcher_for_deep_ep_trains_like_one_process(
    two_processes: Processes, one_process, hf_folder, layout: str
) -> None:
    one, kept = one_process
    answers = two_processes.run(switch_cases.train_with_deep_ep, layout=layout, compare_with=kept, **case_of(hf_folder))
    train_alike(answers, one)


# --- weights ----------------------------------------------------------------------------------------------------------


@MOE
@pytest.mark.parametrize("layout", ["DP2", "EP2"])
def test_update_gathers_every_weight_once(two_processes: Processes, hf_folder, layout: str) -> None:
    for gathered, weights in two_processes.run(switch_cases.gathered_by_an_update, layout=layout, **case_of(hf_folder)):
        assert gathered == weights


# --- batches ----------------------------------------------------------------------------------------------------------


def test_copies_to_the_device_keep_their_order() -> None:
    for number in range(4):
        tensors = [torch.full((size,), size) for size in range(number)]  # the first is empty
        assert [len(copied) for copied in copied_ahead(tensors)] == list(range(number))


# --- garbage ----------------------------------------------------------------------------------------------------------


def test_garbage_is_collected_at_steps_alone() -> None:
    collections: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collections.append(info["generation"])

    def make_garbage() -> None:
        for _ in range(100_000):
            cycle: list[Any] = []
            cycle.append(cycle)

    with garbage_collected_every(3) as garbage:
        gc.callbacks.append(note)
        try:
            for step in (1, 2):
                make_garbage()
                garbage.after_step(step)
            assert collections == []
            garbage.after_step(3)
            assert collections == [2]
        finally:
            gc.callbacks.remove(note)
    assert gc.isenabled()


def _answer(parent: int, pipe: Any) -> None:
    init_worker(parent, 0)
    pipe.send(gc.isenabled())


def test_data_workers_collect_their_own_garbage() -> None:
    here, there = multiprocessing.Pipe()
    with garbage_collected_every(3):
        assert not gc.isenabled()
        worker = multiprocessing.get_context("fork").Process(target=_answer, args=(os.getpid(), there))
        worker.start()
        assert here.poll(30)
        assert here.recv()
        worker.join(10)


@pytest.mark.slow
def test_collections_at_steps_change_no_bit(config_file: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "python", tmp_path / "steps"]
    for folder, interval in zip(folders, (0, 2), strict=True):
        train(config_file, [f"train.output_dir={folder}", f"train.gc_interval={interval}"])
    plain, at_steps = ([(line["loss"], line["grad_norm"]) for line in metrics(folder)] for folder in folders)
    assert plain == at_steps
