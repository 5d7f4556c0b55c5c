"""Saves in the background give the bytes of other saves, and which checkpoints are kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tests.launch import fail, finish, is_saving, kill_rank_when, metrics, process_of_rank, start, train, wait_until
from tests.model.test_checkpoint_files import can_mount, full_file_system
from tests.processes import Processes
from tests.training import saving_cases
from tests.training.step_cases import case_of
from tests.training.test_resume import trace
from tests.training.test_survival import DETERMINISTIC

IN_THE_BACKGROUND = "checkpoint.async_save=true"


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with Processes(2) as processes:
        yield processes


LAYOUTS = [
    ("glm4v_moe", "EP2", ["vision"]),
    ("glm4v_moe", "PP2 VPP2", []),
    pytest.param("glm4v_moe", "DP2", [], marks=pytest.mark.slow),
    pytest.param("glm4v_moe", "PP2", ["decoder"], marks=pytest.mark.slow),  # the last stage has nothing to train
    pytest.param("glm4v", "TP2 SP", [], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("hf_folder", "layout", "frozen"), LAYOUTS, indirect=["hf_folder"])
def test_copy_that_is_written_after_the_next_step_has_the_bytes_of_its_moment(
    two: Processes, hf_folder: Any, layout: str, frozen: list[str], tmp_path: Path
) -> None:
    two.run(saving_cases.save_copies, layout=layout, frozen=frozen, out=str(tmp_path), **case_of(hf_folder))
    for step in (2, 3):
        assert hashes(tmp_path / f"copy_{step}") == hashes(tmp_path / f"state_{step}")
    assert hashes(tmp_path / "state_2")["state/__0_0.distcp"] != hashes(tmp_path / "state_3")["state/__0_0.distcp"]


def test_storage_that_fails_on_one_rank_is_said_on_all(two: Processes, tmp_path: Path) -> None:
    """Rank 1 compares its own file. Reading the begin of /proc/self/mem, of 0 bytes, is an input/output error."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "__1_0.distcp").symlink_to("/proc/self/mem")
    entry = {"bytes": 0, "xxh3_64": [xxhash.xxh3_64(b"").hexdigest()]}
    manifest = {"block_bytes": 2**30, "files": {"state/__1_0.distcp": entry}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    said = two.run(saving_cases.verify, folder=str(tmp_path))
    assert said[0] == said[1]
    assert said[0].startswith(f"StorageError: {tmp_path}/state/__1_0.distcp cannot be read (Input/output error)")


def files_of_run(run: Path) -> dict[str, dict[str, str]]:
    """Return the hashes of all files of all checkpoints, without what the configuration is part of."""
    found = {}
    for step in sorted((run / "checkpoints").glob("step_*")):
        found[step.name] = {
            name: value for name, value in hashes(step).items() if name not in ("train_state.json", "manifest.json")
        }
    return found


def train_state(step: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((step / "train_state.json").read_text())
    return {**state, "config": {**state["config"], "checkpoint": None, "train": None}}


def test_runs_that_save_in_the_background_and_not_are_equal(config_file: Path, tmp_path: Path) -> None:
    """Every file of every checkpoint, and training too. Each save begins while the one before may still be written."""
    common = ["checkpoint.save_interval=1", "checkpoint.keep_last=2", "checkpoint.keep_every=2", "train.steps=5"]
    runs = {name: tmp_path / name for name in ("true", "false")}
    outputs = {
        name: train(config_file, [*common, f"checkpoint.async_save={name}", f"train.output_dir={run}"])
        for name, run in runs.items()
    }
    kept = files_of_run(runs["true"])
    assert list(kept) == ["step_0000002", "step_0000004", "step_0000005"]
    assert kept == files_of_run(runs["false"])
    assert trace(runs["true"]) == trace(runs["false"])
    for step in kept:
        states = [train_state(run / "checkpoints" / step) for run in runs.values()]
        assert states[0] == states[1]
    for name, run in runs.items():
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", *kept]
        assert (run / "checkpoints" / "latest").read_text() == "step_0000005\n"
        assert outputs[name].count("saved ") == 5


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_run_killed_during_a_save_in_the_background_resumes_bit_for_bit(
    config_file: Path, tmp_path: Path, rank: int
) -> None:
    common = [IN_THE_BACKGROUND, "train.precision=bf16", "train.steps=5", "checkpoint.save_interval=2"]
    train(config_file, [*common, f"train.output_dir={tmp_path}/whole"])
    killed = tmp_path / "killed"
    launcher = start(config_file, [*common, f"train.output_dir={killed}"])
    kill_rank_when(is_saving, launcher, killed, step=4, rank=rank)
    finish(launcher)
    assert launcher.returncode != 0
    output = train(config_file, [*common, f"train.output_dir={killed}"])
    assert "step 2 of 5" in output or "step 4 of 5" in output  # by which was killed first, the rank or the save
    assert trace(killed) == trace(tmp_path / "whole")
    assert files_of_run(killed)["step_0000005"] == files_of_run(tmp_path / "whole")["step_0000005"]


def has_failed(run: Path, _step: int) -> bool:
    return (run / "state.json").exists() and json.loads((run / "state.json").read_text())["state"] == "failed"


@pytest.mark.slow
def test_error_on_one_rank_is_announced_before_a_long_save_ends_which_is_finished(
    config_file: Path, tmp_path: Path
) -> None:
    """A data worker of rank 1 is killed while both ranks write."""
    run = tmp_path / "run"
    options = [IN_THE_BACKGROUND, "train.steps=500", "parallel.expert_model_parallel_size=2"]
    launcher = start(config_file, options, entry="tests.training.slow_disk_train")
    wait_until(is_saving, launcher, run, step=3)
    for worker in process_of_rank(launcher, 1).children():
        worker.kill()
    wait_until(has_failed, launcher, run, step=3)
    assert is_saving(run, 3)
    output = finish(launcher)
    assert launcher.returncode != 0
    [error] = re.findall(r"^error.*", output, re.MULTILINE)
    assert error.startswith("error on rank 1: a data worker died")
    assert (run / "checkpoints" / "latest").read_text() == "step_0000003\n"
    assert "state/__1_0.distcp" in hashes(run / "checkpoints" / "step_0000003")


@pytest.mark.parametrize("fits", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_full_disk_in_the_background_ends_the_run_with_one_reason(
    config_file: Path, undisturbed: Callable[..., Path], tmp_path: Path, fits: int
) -> None:
    """The last whole checkpoint stays, and nothing of the unfinished one."""
    whole = undisturbed(config_file, *DETERMINISTIC) / "checkpoints" / "step_0000006"
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    with full_file_system(checkpoints, int((fits + 0.6) * size)):
        errors = fail(config_file, [*DETERMINISTIC, IN_THE_BACKGROUND, "checkpoint.save_interval=2"])
        step = 2 * (fits + 1)
        assert len(set(errors)) == 1
        assert errors[0].startswith(f"cannot write the checkpoint {checkpoints}/step_{step:07d}: ")
        assert "No space left on device" in errors[0]
        assert len(metrics(tmp_path / "run")) <= step + 2
        left = sorted(path.name for path in checkpoints.iterdir())
        assert left == (["latest", "step_0000002"] if fits else [".first_save"])


if not can_mount():  # only root may
    del test_full_disk_in_the_background_ends_the_run_with_one_reason
