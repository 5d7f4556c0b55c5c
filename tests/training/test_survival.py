"""What clusters do to a run: signals, hanging and lost processes, damaged checkpoints, full disks."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch import finish, has_reached, is_saving, process_of_rank, start, train, wait_until
from tests.training.test_resume import stored_tensors, trace

DETERMINISTIC = ["parallel.expert_model_parallel_size=2", "train.precision=fp32", "train.deterministic=true"]
SHORT = ["health.hang_seconds=5", "health.allowance_seconds=60"]


def state(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "state.json").read_text()))


def stop_by_signal(launcher: subprocess.Popen[str], run: Path) -> str:
    process_of_rank(launcher, 1).send_signal(signal.SIGUSR1)
    return "SIGUSR1 on rank 1"


def stop_by_torchrun(launcher: subprocess.Popen[str], run: Path) -> str:
    launcher.send_signal(signal.SIGTERM)
    return r"SIGTERM on rank [01]"


def stop_by_file(launcher: subprocess.Popen[str], run: Path) -> str:
    (run / "stop").touch()
    return f"the file {run}/stop"


def test_stopped_then_hung_then_damaged_run_equals_an_undisturbed_one(
    config_file: Path, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """SIGUSR1 at step 1; SIGSTOP at step 5; then the newest checkpoint is damaged. The same command each time."""
    whole, run = undisturbed(config_file, *DETERMINISTIC), tmp_path / "run"
    command = [*DETERMINISTIC, *SHORT, "checkpoint.save_interval=4"]

    stopped_at = stopped(config_file, command, run, stop_by_signal)
    assert stopped_at in (1, 2, 3)

    launcher = start(config_file, command)
    wait_until(has_reached, launcher, run, step=5)
    hung = process_of_rank(launcher, 1)
    hung.suspend()
    others = psutil.Process(launcher.pid).children(recursive=True)
    output = finish(launcher)
    assert launcher.returncode != 0
    silent = rf"rank 1 \(process {hung.pid} on {socket.gethostname()}\) gave no sign for \d+ s at step \d \(\w+\)"
    [error] = re.findall("^error.*", output, re.MULTILINE)
    assert re.match(rf"error: no progress for 5 s at step \d \(\w+\): {silent}. The stacks are in {run}/stacks", error)
    assert not psutil.wait_procs(others, timeout=10)[1]
    in_a_collective = r"torch/distributed/distributed_c10d\.py|megatron/core/distributed/param_and_grad_buffer\.py"
    assert re.search(in_a_collective, (run / "stacks" / "rank_000.txt").read_text())
    assert re.search(rf"{silent}\nprocess {hung.pid} is in state T", (run / "stacks" / "rank_001.txt").read_text())
    assert state(run)["state"] == "running"
    assert (run / "checkpoints" / "latest").read_text() == "step_0000004\n"

    newest = run / "checkpoints" / "step_0000004"
    damaged = newest / "state" / "__1_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    output = train(config_file, command)
    assert (
        f"the checkpoint step_0000004 is damaged: the run falls back to step_{stopped_at:07d}. The cause: {damaged} is"
        in output
    )
    assert (run / "checkpoints" / "step_0000004.damaged" / "state" / "__1_0.distcp").read_bytes() == content
    assert trace(run) == trace(whole)
    assert stored_tensors(run) == stored_tensors(whole)
    assert state(run) == {"state": "complete", "step": 6, "steps": 6, "reason": ""}


def stopped(
    config: Path,
    command: list[str],
    run: Path,
    ask: Callable[[subprocess.Popen[str], Path], str],
    max_restarts: int = 0,
) -> int:
    """Start a run, ask it to stop at step 1, and return the step at which it stopped with a checkpoint."""
    launcher = start(config, command, max_restarts=max_restarts)
    wait_until(has_reached, launcher, run, step=1)
    who = ask(launcher, run)
    output = finish(launcher)
    assert launcher.returncode != 0
    [(step, by)] = re.findall(r"stopped at step (\d) by (.*); the same command resumes", output)
    assert re.fullmatch(who, by)
    assert "error: " not in output
    if ask is not stop_by_torchrun:
        assert "exitcode  : 75 " in output
    assert state(run) == {"state": "stopped", "step": int(step), "steps": 6, "reason": f"by {by}"}
    assert (run / "checkpoints" / "latest").read_text() == f"step_{int(step):07d}\n"
    assert not (run / "stop").exists()
    return int(step)


@pytest.mark.slow
@pytest.mark.parametrize("ask", [stop_by_torchrun, stop_by_file])
def test_run_stops_at_one_step_and_resumes(
    config_file: Path, undisturbed: Callable[..., Path], tmp_path: Path, ask: Callable[..., str]
) -> None:
    """Twice; torchrun's restarts do not undo a stop."""
    whole, run = undisturbed(config_file, *DETERMINISTIC), tmp_path / "run"
    assert stopped(config_file, DETERMINISTIC, run, ask, max_restarts=1) <= 3
    train(config_file, DETERMINISTIC)
    assert trace(run) == trace(whole)
    assert stored_tensors(run) == stored_tensors(whole)


@pytest.mark.slow
def test_signals_while_saving_do_not_disturb_the_save(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = start(config_file)
    wait_until(is_saving, launcher, run, step=3)
    ranks = [process_of_rank(launcher, rank) for rank in (0, 1)]
    while is_saving(run, 3):
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
            rank.send_signal(signal.SIGUSR1)
    output = finish(launcher)
    assert "stopped at step 3 by SIG" in output
    assert state(run)["state"] == "stopped"
    assert "step 3 of 6, from" in train(config_file)


@pytest.mark.slow
def test_stopped_main_process_is_found_by_the_others_and_torchrun_restarts_the_run(
    config_file: Path, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    whole, run = undisturbed(config_file, *DETERMINISTIC), tmp_path / "run"
    launcher = start(config_file, [*DETERMINISTIC, *SHORT], max_restarts=1)
    wait_until(has_reached, launcher, run, step=4)
    process_of_rank(launcher, 0).suspend()
    output = finish(launcher)
    assert launcher.returncode == 0
    assert re.search(
        r"error: no progress for 5 s at step \d \(\w+\): rank 0 \(process \d+ on \S+\) gave no sign", output
    )
    assert trace(run) == trace(whole)
    assert stored_tensors(run) == stored_tensors(whole)


@pytest.mark.slow
def test_full_disk_ends_the_run_with_its_last_checkpoint_whole(
    config_file: Path, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """The disk has room for one checkpoint, and for all of the next but `.metadata`, which rank 0 writes alone."""
    whole = undisturbed(config_file, *DETERMINISTIC)
    sizes = {path.name: path.stat().st_size for path in whole.glob("checkpoints/step_0000006/**/*") if path.is_file()}
    pages = {name: -(-size // 4096) for name, size in sizes.items()}
    late = pages[".metadata"] + pages["manifest.json"]
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    room = 4096 * (2 * sum(pages.values()) - late + 2)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", checkpoints], check=True)
    try:
        launcher = start(config_file, DETERMINISTIC)
        output = finish(launcher)
        assert launcher.returncode != 0
        errors = re.findall("^error.*", output, re.MULTILINE)
        assert errors == [
            error for error in errors if "cannot write the checkpoint" in error and "No space left" in error
        ]
        assert state(tmp_path / "run")["state"] == "failed"
        assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_0000003"]
        subprocess.run(["mount", "-o", f"remount,size={4 * room}", checkpoints], check=True)
        assert "step 3 of 6, from" in train(config_file, DETERMINISTIC)
        assert stored_tensors(tmp_path / "run") == stored_tensors(whole)
    finally:
        subprocess.run(["umount", checkpoints], check=True)


@pytest.mark.slow
def test_full_disk_during_metrics_ends_the_run_in_one_line(
    config_file: Path, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """Rank 0 may not write files above 100 bytes after step 4; rank 1 learns why it is alone."""
    whole, run = undisturbed(config_file, *DETERMINISTIC), tmp_path / "run"
    launcher = start(config_file, DETERMINISTIC)
    wait_until(has_reached, launcher, run, step=4)
    process_of_rank(launcher, 0).rlimit(psutil.RLIMIT_FSIZE, (100, 100))
    output = finish(launcher)
    assert launcher.returncode != 0
    [error] = re.findall("^error.*", output, re.MULTILINE)
    assert error.startswith("error on rank 0: ")
    assert "File too large" in error
    assert "training/loop.py" not in output
    train(config_file, DETERMINISTIC)
    assert trace(run) == trace(whole)
