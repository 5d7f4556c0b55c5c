"""Runs of rl.train with vLLM servers: a task with images, a server, and which processes belong to a run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from demo.digits import build
from rl.engines.server import JsonApi
from rl.engines.vllm_process import VllmProcess
from tests.engines.engine_folders import ENGINES, convert
from tests.engines.rollout_cases import OPTIONS, TOLERANCE
from tests.launch import finish, start, wait_until
from tests.rl.digit_runs import learn_to_answer, write_config

ENTRY = "rl.train"
MARK = "GLMV_TEST_RUN"  # variable of the environment that all processes of a run have
SECONDS = 600.0  # for a run, on a busy machine
MAX_LENGTH = 1024
STARTED: dict[str, Any] = {
    "start": 1,
    "start_python": str(ENGINES),
    "start_options": OPTIONS,
    "start_seconds": 900.0,
}
FORMS = {"glm4v": ("tiny_dense", "glm41v", "150"), "glm4v_moe": ("tiny_moe", "glm45v", "150")}


@dataclass(frozen=True)
class Task:
    """Handwritten digits, and a model that has learned to answer.

    Attributes:
        root: The folder of everything.
    """

    root: Path

    @property
    def digits(self) -> Path:
        return self.root / "digits"

    @property
    def exported(self) -> Path:
        """The model's Hugging Face folder."""
        return self.root / "exported"

    def config(self, run: Path, *, rollout: dict[str, Any], **changes: Any) -> Path:
        """Write the configuration of a run with servers, which stops where they are not the policy."""
        limits = {"engine": "vllm", "max_mismatch": TOLERANCE, "health_seconds": 60.0}
        file = run.with_suffix(".yaml")
        checkpoint = {"checkpoint": {"save_interval": 1}}
        return write_config(
            self.digits, self.root / "start", run, file, **{**checkpoint, **changes, "rollout": {**limits, **rollout}}
        )


def make_task(variant: str, root: Path) -> Task:
    """Write the digits, let a model learn to answer, and export it."""
    preset, form, steps = FORMS[variant]
    task = Task(root)
    build(task.digits, chats=48, prompts=64, held_out=16, chat_form=form)
    learn_to_answer(task.digits, root / "start", f"model.preset={preset}", f"train.steps={steps}")
    (checkpoint,) = (root / "start/checkpoints").glob("step_*")
    convert("export", "--checkpoint", checkpoint, "--out", task.exported)
    return task


def start_server(folder: Path, log: Path) -> VllmProcess:
    """Start a server that is not of a run, and wait until it answers."""
    process = VllmProcess(str(ENGINES), folder, MAX_LENGTH, OPTIONS, log)
    process.wait(STARTED["start_seconds"], lambda: None)
    return process


# --- a run ------------------------------------------------------------------------------------------------------------


def start_run(config: Path, processes: int = 1) -> subprocess.Popen[str]:
    """Start a run whose processes all carry MARK."""
    os.environ[MARK] = str(config)
    try:
        return start(config, entry=ENTRY, processes=processes)
    finally:
        del os.environ[MARK]


def complete(config: Path, processes: int = 1) -> str:
    """Let a run come to its end, and return its output."""
    launcher = start_run(config, processes)
    output = finish(launcher, SECONDS)
    assert launcher.returncode == 0, output
    return output


def refused(config: Path) -> str:
    """Return the one line with which a run ends."""
    launcher = start_run(config)
    output = finish(launcher, SECONDS)
    assert launcher.returncode != 0, output
    (error,) = set(re.findall(r"^error(?: on rank \d+)?: (.*)$", output, re.MULTILINE))
    assert "training/loop.py" not in output  # no stack trace but the launcher's own
    return error


def reach(condition: Callable[[Path, int], bool], launcher: subprocess.Popen[str], run: Path, step: int) -> None:
    wait_until(condition, launcher, run, step=step, timeout=SECONDS)


def processes_of(config: Path) -> list[psutil.Process]:
    """Return what is left of the runs with this configuration."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(config) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def nothing_is_left(config: Path, seconds: float = 60.0) -> bool:
    """Whether all processes of a run end within some seconds. Those that do not are killed."""
    end = time.monotonic() + seconds
    while left := processes_of(config):
        if time.monotonic() > end:
            print("left:", [" ".join(process.cmdline())[:120] for process in left])
            for process in left:
                process.send_signal(signal.SIGKILL)
            return False
        time.sleep(0.2)
    return True


# --- a server ---------------------------------------------------------------------------------------------------------


def served_version(address: str) -> str:
    return str(JsonApi(address).get("/weight_info", 60)["weight_version"])


def requests_running(address: str) -> int:
    text = requests.get(f"{address}/metrics", timeout=60).text
    (count,) = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", text, re.MULTILINE)
    return int(float(count))


def is_drawing_on(address: str) -> Callable[[Path, int], bool]:
    """Return a condition: whether the server draws the rollouts of an iteration of a run."""

    def is_drawing(run: Path, step: int) -> bool:
        return served_version(address).startswith(f"{step - 1} of {run.name}-") and requests_running(address) > 0

    return is_drawing
