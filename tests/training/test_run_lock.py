"""Two runs never write into one folder, and a killed run does not block the next one."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from tests.launch import ROOT, has_reached, wait_until
from training.run_lock import RUN_LOCK, run_lock


def test_second_run_is_refused_until_the_first_is_killed(config_file: Path, tmp_path: Path) -> None:
    """The first run has a data worker; the second has two processes, which no launcher ends. Then kill -9."""
    run = tmp_path / "run"
    first = start_alone(config_file, "train.steps=100000", "checkpoint.save_interval=0")
    try:
        wait_until(has_reached, first, run, step=1)
        holder = json.loads((run / RUN_LOCK).read_text())
        assert holder == {"host": socket.gethostname(), "pid": first.pid}

        first.send_signal(signal.SIGSTOP)  # leaves the cores to the second run
        joined = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        ranks = [start_alone(config_file, "train.steps=7", RANK=rank, LOCAL_RANK=rank, **joined) for rank in ("0", "1")]
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
        assert [process.returncode for process in ranks] == [2, 2], outputs
        [error] = [line for output in outputs for line in output.splitlines() if line.startswith("error")]
        assert error == (
            f"error: train.output_dir={run} is in use by another run, process {first.pid} on {holder['host']}: "
            "wait until it has ended, end it, or choose another train.output_dir; if that machine is gone for good, "
            f"remove {run / RUN_LOCK}"
        )
        assert "step 0 of 7" not in (run / "log.txt").read_text()
    finally:
        first.kill()
        first.wait()
    with run_lock(run) as refusal:
        assert refusal == ""


def start_alone(config: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    """Start one process of a run, without torchrun."""
    command = [sys.executable, "-m", "pretrain.train", "--config", str(config), *overrides]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return int(listening.getsockname()[1])


def hold(folder: Path, answers: Connection) -> None:
    """Take the lock, fork a child as the loader does, and sleep."""
    with run_lock(folder) as refusal:
        child = os.fork()
        if child:
            answers.send((refusal, child))
        time.sleep(60)


@pytest.mark.fast
def test_forked_workers_do_not_keep_the_lock(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    holder = fork.Process(target=hold, args=(tmp_path / "run", there))
    holder.start()
    refusal, worker = here.recv()
    try:
        assert refusal == ""
        with run_lock(tmp_path / "run") as refusal:
            assert f"is in use by another run, process {holder.pid} on {socket.gethostname()}: wait" in refusal
        (tmp_path / "run" / RUN_LOCK).write_text("")
        with run_lock(tmp_path / "run") as refusal:
            assert "by another run, a process that is just starting: wait" in refusal
        holder.kill()
        holder.join()
        with run_lock(tmp_path / "run") as refusal:
            assert refusal == ""
        assert psutil.pid_exists(worker)
    finally:
        holder.kill()
        os.kill(worker, signal.SIGKILL)
    assert json.loads((tmp_path / "run" / RUN_LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.fast
def test_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")  # as Lustre answers

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with caplog.at_level(logging.WARNING), run_lock(tmp_path) as refusal:
        assert refusal == ""
    assert f"train.output_dir={tmp_path} is on a file system without locks (Function not implemented)" in caplog.text


@pytest.mark.fast
def test_only_the_main_process_takes_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / RUN_LOCK).mkdir()
    with run_lock(tmp_path) as refusal:
        assert f"{tmp_path}/run.lock cannot be opened (Is a directory); choose another" in refusal
    monkeypatch.setenv("RANK", "1")
    with run_lock(tmp_path) as refusal:
        assert refusal == ""
