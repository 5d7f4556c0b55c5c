"""Start training as a user does: torchrun in a new process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent


def start(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    processes: int = 2,
    entry: str = "pretrain.train",
    max_restarts: int = 0,
) -> subprocess.Popen[str]:
    """Start torchrun on this machine, from the repository's root."""
    options = ["--standalone", f"--nproc_per_node={processes}", f"--max-restarts={max_restarts}"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *options,
        "-m",
        entry,
        "--config",
        str(config),
        *overrides,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(launcher: subprocess.Popen[str], timeout: float = 240) -> str:
    """Wait for the end and return the output; kill all processes if it does not come in time."""
    try:
        return launcher.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        for process in [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]:
            process.kill()
        raise


def train(config: Path, overrides: Sequence[str] = (), **options: Any) -> str:
    """Run to the end and return the output."""
    launcher = start(config, overrides, **options)
    output = finish(launcher)
    assert launcher.returncode == 0, output
    return output


def fail(config: Path, overrides: Sequence[str] = (), **options: Any) -> list[str]:
    """Run until an error in the input ends it, and return the messages, one per process that reports it."""
    launcher = start(config, overrides, **options)
    output = finish(launcher)
    assert launcher.returncode != 0, output
    errors = re.findall(r"^error(?: on rank \d+)?: (.*)$", output, re.MULTILINE)
    assert errors, output
    assert "training/loop.py" not in output  # no stack trace but the launcher's own
    return errors


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the complete lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def has_reached(run: Path, step: int) -> bool:
    """Whether the run has recorded `step`."""
    return any(line["step"] >= step for line in metrics(run))


def is_saving(run: Path, step: int) -> bool:
    """Whether the run is writing the checkpoint of `step`."""
    return (run / "checkpoints" / f".unfinished_step_{step:07d}").exists()


def wait_until(
    condition: Callable[[Path, int], bool],
    launcher: subprocess.Popen[str],
    run: Path,
    *,
    step: int,
    timeout: float = 120,
) -> None:
    """Wait until `condition(run, step)` holds; fail after `timeout` seconds, or if the run ends before."""
    deadline = time.monotonic() + timeout
    while not condition(run, step):
        assert time.monotonic() < deadline, f"{condition.__name__} is false for step {step} of {run} after {timeout} s"
        assert launcher.poll() is None, finish(launcher)
        time.sleep(0.01)


def kill_rank_when(
    condition: Callable[[Path, int], bool], launcher: subprocess.Popen[str], run: Path, *, step: int, rank: int
) -> None:
    """Kill -9 one rank as soon as `condition(run, step)` holds."""
    wait_until(condition, launcher, run, step=step)
    process_of_rank(launcher, rank).kill()


def process_of_rank(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    """Return the process of a rank that torchrun has started."""
    ranks = {process.environ().get("RANK"): process for process in psutil.Process(launcher.pid).children()}
    return ranks[str(rank)]
